"""The adapters of one module, the tensors that they adapt, and the names of their tensors.

Adapter tensors are plain Parameters of their module with flat names, found through its
`Attached` and never through their names. They are looked up at each use, because `fully_shard` and
`.to()` replace them.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.core.functional.factors import Patch, Spans, Update
from lora_inject.core.functional.gain import Gain
from lora_inject.core.functional.torch_inside import Hooks
from lora_inject.core.layers.selection import Selected, Selection
from lora_inject.core.spec.sites import SiteSpec, signed_pairs
from lora_inject.core.spec.variants import VARIANTS
from lora_inject.errors import LayerError


def encode(adapter: str) -> str:
    """Return an adapter's name in a form for parameters' names, which cannot have a dot."""
    return adapter.replace("%", "%25").replace(".", "%2E")


def attribute(role: str, adapter: str, param: str | None = None) -> str:
    """Return the flat name of an adapter's tensor on its module, with the parameter if it is read.

    Examples:
        >>> attribute("A", "default"), attribute("T", "v1.2", "bias")
        ('lora_A__default', 'bias__lora_T__v1%2E2')
    """
    flat = f"lora_{role}__{encode(adapter)}"
    return flat if param is None else f"{param}__{flat}"


# Not frozen, which takes three times as long to make: there are many thousands. Each is itself.
@dataclass(eq=False)
class Entry:
    """One adapter on one tensor of one module."""

    adapter: str
    spec: SiteSpec | None  # None for a full trained copy
    param: str  # name of the parameter in the module that is adapted
    names: Mapping[str, str]  # role (`A`, `B`, `A0`, `B0`, a variant's, `T` of a copy) to flat name
    shape: tuple[int, ...] = ()  # of a trained copy
    rows: tuple[int, ...] | None = None  # indices of the rows that a copy holds, None for all
    scale: float | None = None  # factor on values that are added; None if they replace the tensor
    layers: str = ""  # `AdapterState.layers`

    @property
    def mark(self) -> str:
        """A name that no other entry of its module has: that of its first tensor."""
        return next(iter(self.names.values()))

    @property
    def on_output(self) -> bool:
        """Whether the update is added to the output of its layer, rather than read with W."""
        return self.spec is not None and self.spec.update == "forward"

    def held(self, module: nn.Module) -> Tensor:
        """Return the current tensor of the first role; a copy has no other."""
        value: Tensor = held_by(module)[self.mark]
        return value

    def start(self, base: Tensor) -> Tensor:
        """Return what a full copy or an added value is before training, for its base tensor."""
        if self.scale is not None:
            return torch.zeros_like(base)
        return base.detach() if self.rows is None else base.detach()[list(self.rows)]

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the current tensor of each role."""
        held = held_by(module)
        return {role: held[flat] for role, flat in self.names.items()}

    def shape_of(self, role: str) -> tuple[int, ...]:
        """Return the shape that the tensor of a role has, unsharded."""
        return self.shape if self.spec is None else self.spec.shape_of(role)

    def trains(self, role: str) -> bool:
        """Return whether the tensor of a role trains: all but a frozen start and a bias of B."""
        return self.scale is None if self.spec is None else role in self.spec.shapes

    def trainable(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return the Parameter of each role that trains, as optimizers hold it."""
        held = ((role, module._parameters[flat]) for role, flat in self.names.items())
        return {role: p for role, p in held if p is not None and self.trains(role)}

    @property
    def gained(self) -> bool:
        """Whether its outputs have a gain besides the update of W."""
        return self.spec is not None and VARIANTS[self.spec.variant].gained

    def gain(self, held: Mapping[str, Tensor]) -> Gain | None:
        """Return the gain of its outputs, None if its variant has none."""
        if self.spec is None or not self.gained:
            return None
        variant = VARIANTS[self.spec.variant]
        tensors = {role: held[self.names[role]] for role in variant.roles}
        return Gain(variant.gain, tensors, self.spec.spans)

    def recipes(self, weight: float) -> Iterator[Recipe]:
        """Yield the update, and with a negative scale the frozen start of pissa or olora."""
        spec = self.spec
        assert spec is not None
        spans = spec.spans if spec.slices else None
        for A, B, sign in self.pairs():
            scale = sign * spec.scale * weight
            yield Recipe(A, B, spec.a_shape[-2], scale, spans, spec.dropout)

    def patches(self, held: Mapping[str, Tensor], weight: float) -> list[Patch]:
        """Return the same as W takes it, with the current tensors."""
        spec = self.spec
        assert spec is not None
        return [Patch(spec, held[A], held[B], weight * sign) for A, B, sign in self.pairs()]

    def pairs(self) -> tuple[tuple[str, str, float], ...]:
        """Return the names of A and B with sign 1, and of a frozen start with sign -1."""
        names = self.names
        return signed_pairs(names["A"], names["B"], names.get("A0"), names.get("B0"))


class Recipe(NamedTuple):
    """One update of a forward update: the names of its tensors and its numbers.

    Attributes:
        rank: How many rows A has.
    """

    A: str
    B: str
    rank: int
    scale: float
    spans: Spans | None = None
    dropout: float = 0.0


def factors_of(
    recipes: Iterable[Recipe], held: Mapping[str, Tensor], *, training: bool
) -> list[Update]:
    """Return updates with their tensors, which are looked up at each call."""
    return [
        Update(held[A], held[B], scale, spans, dropout if training else 0.0)
        for A, B, _, scale, spans, dropout in recipes
    ]


class Still(NamedTuple):
    """A buffer that no forward may move.

    Attributes:
        buffer: The tensor.
        version: Its version; None until its values were compared after a forward.
        values: A copy of its values.
    """

    buffer: Tensor
    version: int | None
    values: Tensor


NOBODY: tuple[Selected | None, tuple[Recipe, ...]] = None, ()


class Attached:
    """What one module carries.

    Tables of entries are replaced, never written to: a forward in another thread reads one as it
    was, and what a verb has changed is put back by the attributes alone (`layers.snapshot`).
    """

    # What few modules have stands here, as there are many thousands.
    # That of the plain class, as a hook had saved it on the module.
    old_forward: MethodType | None = None
    float32 = False  # whether an adapter on the output asks for float32 arithmetic
    time_major = False  # whether its input may have time before batch (`rows.seen`)
    no_rows = False  # whether no length of its input says that its first axis is the rows
    gains = False  # whether an adapter on the output has a gain
    # Marks of the entries that others read while forwards used them.
    read_from_outside: frozenset[str] = frozenset()
    # Marks of the entries with memory that nobody has written to.
    garbage: frozenset[str] = frozenset()

    def __init__(self, selection: Selection) -> None:
        self.selection = selection  # says which adapters take part
        self.forward: Mapping[str, Entry] = {}  # by adapter, on the output of this layer
        self.reads: Mapping[str, Mapping[str, Entry]] = {}  # by parameter and adapter
        self.flat: frozenset[str] = frozenset()  # names of their tensors among the parameters
        self._base: tuple[str, ...] = ()  # those of the other parameters
        # For each thread that runs a forward of the module: the effective weights read in it, and
        # the hooks on saved tensors that it was entered with.
        self.running: dict[int, tuple[dict[Hashable, Tensor], Hooks | None]] = {}
        # Where a copy trains: the saved buffers of the module, as the last forward found them.
        self.still: dict[str, Still] = {}
        # Marks of the entries that forwards have used: a set, to which several threads may add.
        self.took_part: set[str] = set()
        # Whose updates on the output were looked up last, and these: one object, which another
        # thread cannot change between two reads.
        self.last_chosen = NOBODY

    def entries(self, adapter: str | None = None) -> Iterator[Entry]:
        """Yield the entries of one adapter, or all, forward update first."""
        for table in (self.forward, *self.reads.values()):
            if adapter is None:
                yield from table.values()
            elif adapter in table:
                yield table[adapter]

    def add(self, entry: Entry) -> None:
        """Register an entry whose tensors are on the module."""
        self.flat = self.flat.union(entry.names.values())
        self.last_chosen = NOBODY
        if entry.on_output:
            self.forward = {**self.forward, entry.adapter: entry}
            self._note_kind(entry)
        else:
            beside = self.reads.get(entry.param, {})
            self.reads = {**self.reads, entry.param: {**beside, entry.adapter: entry}}

    def _note_kind(self, entry: Entry) -> None:
        spec = entry.spec
        if spec is not None:
            self.float32 = self.float32 or spec.compute == "float32"
            self.gains = self.gains or VARIANTS[spec.variant].gained

    def remove(self, adapter: str) -> list[Entry]:
        """Forget an adapter and return its entries."""
        removed = list(self.entries(adapter))
        marks = {entry.mark for entry in removed}
        self.forward = _without(adapter, self.forward)
        reads = ((param, _without(adapter, table)) for param, table in self.reads.items())
        self.reads = {param: table for param, table in reads if table}
        self.took_part = self.took_part - marks
        self.garbage = self.garbage - marks
        self.flat = self.flat.difference(*(entry.names.values() for entry in removed))
        self.last_chosen = NOBODY
        self.float32 = self.gains = False
        for entry in self.forward.values():
            self._note_kind(entry)
        return removed

    def base(self, parameters: Mapping[str, nn.Parameter | None]) -> dict[str, nn.Parameter]:
        """Return the parameters without the adapters'."""
        names = self._base  # else a walk would cost more with each adapter
        if len(parameters) != len(names) + len(self.flat) or not parameters.keys() >= set(names):
            names = self._base = tuple(key for key in parameters if key not in self.flat)
        return {key: p for key in names if (p := parameters[key]) is not None}

    def recipes(self, mix: Selected) -> tuple[Recipe, ...]:
        """Return the updates on the output that take part under a mix."""
        taking = mix.among(self.forward)
        self.check_started((entry for entry, _ in taking), "a forward")
        return tuple(recipe for entry, weight in taking for recipe in entry.recipes(weight))

    def choose(self, mix: Selected) -> tuple[Recipe, ...]:
        """Look up the same, and note their use."""
        recipes = self.recipes(mix)
        self.used(entry for entry, _ in mix.among(self.forward))
        self.last_chosen = mix, recipes
        return recipes

    def forget_use(self) -> None:
        """Reset the notes of which entries take part in a forward."""
        self.took_part = set()
        self.last_chosen = NOBODY

    def used(self, entries: Iterable[Entry]) -> None:
        """Note that entries take part in a forward."""
        taking = list(entries)
        self.check_started(taking, "a forward")
        if not torch.compiler.is_compiling():  # no graph notes anything
            self.took_part.update(entry.mark for entry in taking)

    def check_started(self, entries: Iterable[Entry], asked: str) -> None:
        """Raise if entries have memory that nobody has written to."""
        for entry in entries if self.garbage else ():
            if entry.mark in self.garbage:
                site = entry.param if entry.spec is None else entry.spec.name
                raise LayerError(
                    f"{asked} with adapter {entry.adapter!r} at {site!r}",
                    "its tensors were made on the meta device or emptied by to_empty(), and "
                    "nothing has started or loaded them since",
                    "Load the base with load_state_dict, which starts them, or write an adapter's "
                    "values with swap_adapter",
                )

    def runs_here(self) -> bool:
        """Whether the module's own forward runs in this thread; unknown in compiled graphs."""
        if torch.compiler.is_compiling() or not self.running:
            return False
        return threading.get_ident() in self.running

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_chosen": NOBODY, "running": {}, "still": {}}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__dict__.update(saved)
        self.selection.add(entry.adapter for entry in self.entries())


def _without(adapter: str, table: Mapping[str, Entry]) -> Mapping[str, Entry]:
    return {name: entry for name, entry in table.items() if name != adapter}


class Carrier(nn.Module):
    """A module that carries adapters, as those see it that its class is built of (`adapted`)."""

    # Name of the layer's weight among its parameters.
    weight_name: ClassVar[str] = "weight"
    # Set on each swapped class: the class without adapters.
    _lora_plain: ClassVar[type[nn.Module]]
    # Set on each module.
    _lora: Attached

    def _lora_raw(self, param: str) -> Any:
        """Return a parameter, or the tensor that FSDP1 or DataParallel has put in its place."""
        for held in (self._parameters, self.__dict__):
            if param in held:
                return held[param]
        return super().__getattr__(param)  # raises

    def _lora_check_vain(self, tensors: Iterable[Tensor]) -> None:
        """Raise if adapters should train but no gradient would reach them."""
        raise NotImplementedError


def attached_to(module: nn.Module) -> Attached | None:
    """Return what a module carries, or None for a plain module."""
    return module.__dict__.get("_lora")


def check_class_kept(module: nn.Module, asked: str) -> None:
    """Raise if a module with adapters was given a class without support for them."""
    if attached_to(module) is not None and not hasattr(type(module), "_lora_plain"):
        cls = type(module).__name__
        problem = f"its layer has adapters and was later given the class {cls}, which leaves them "
        raise LayerError(asked, f"{problem}inert", "Eject them, then inject again")


def check_mixed(taking: Sequence[tuple[Entry, float]]) -> None:
    """Raise if an adapter with a gain is not alone on a tensor, or not with weight 1."""
    alone = next((entry for entry, _ in taking if entry.gained), None)
    if alone is None or (len(taking) == 1 and taking[0][1] == 1.0):
        return
    assert alone.spec is not None
    mix = ", ".join(f"{entry.adapter!r} x {weight:g}" for entry, weight in taking)
    raise LayerError(
        f"site {alone.spec.name!r} with {mix}",
        f"the {alone.spec.variant} of {alone.adapter!r} scales what W and all updates give "
        "together: it is not defined with another adapter, or with another weight",
        f"Activate {alone.adapter!r} alone, with weight 1",
    )


GATHERED = "_is_fsdp_managed_module"
"""By which FSDP1 marks modules whose parameters are views of gathered shards."""


def held_by(module: nn.Module) -> Mapping[str, Any]:
    """Return a module's parameters by name; DataParallel keeps those of a replica elsewhere."""
    own = module.__dict__
    parameters: Mapping[str, Any] = own.get("_former_parameters") or own["_parameters"]
    if GATHERED in own:  # the views are attributes
        return {**parameters, **{name: own[name] for name in own["_lora"].flat if name in own}}
    return parameters
