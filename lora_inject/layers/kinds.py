"""The table of layer kinds, and what of a model can become a site.

A kind of layer is a class with a row in `KINDS`; everything else about a model is read by
one walk, `inventory`, which turns modules and parameters into the names that `matching` works on.
Here, and only here, it is decided how a module would carry an adapter: by its output where its
forward is known or found to be linear in W, else by its weight, or not at all and why.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lora_inject.errors import LayerError
from lora_inject.layers.adapted import Adapted, Geometry, WeightUpdate, adapted_class, plain_class
from lora_inject.layers.attached import attached_to
from lora_inject.layers.embedding_kind import LoRAEmbedding
from lora_inject.layers.linear_kinds import LoRAConv1D, LoRALinear
from lora_inject.layers.probe import linear_in_weight
from lora_inject.layers.weight_only import LoRABilinear, LoRAConv, LoRAConvTranspose
from lora_inject.spec.inventory import Candidate, Inventory
from lora_inject.spec.names import canonical, is_bias, joined

# The first row that matches a module is its kind.
KINDS: list[type[Adapted]] = [
    LoRALinear,
    LoRAConv1D,
    LoRAEmbedding,
    LoRAConv,
    LoRAConvTranspose,
    LoRABilinear,
]

# Deeper than torch's own train() and eval() get before Python's limit on recursion.
MAX_DEPTH = 1000

# These parents read the weights of their children, or do so in a fast path.
READING_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def mixin_for(kind: str) -> type[Adapted]:
    """Return the class of a kind."""
    return next(row for row in KINDS if row.kind == kind)


def register_kind(row: type[Adapted]) -> type[Adapted]:
    """Add a kind of layer from outside the package; it is asked before the built-in ones.

    Args:
        row: A class with a `kind` of its own, `matches` and `geometry`. Derived from `LoRALinear`
            it adds to the layer's output, where a probe finds the layer linear in its weight;
            derived from `WeightUpdate` its weight reads as W + delta. The kind's name travels with
            saved adapters.

    Returns:
        The class, so that this can stand as a decorator.

    Raises:
        LayerError: The class has no kind of its own, or its name is taken by another class.

    Example:
        >>> from torch import nn
        >>> class Dense(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.kernel = nn.Parameter(torch.randn(4, 6))
        ...     def forward(self, x):
        ...         return x @ self.kernel
        >>> @register_kind
        ... class LoRADense(LoRALinear):
        ...     kind, weight_name = "dense", "kernel"
        ...     @classmethod
        ...     def matches(cls, module):
        ...         return isinstance(module, Dense)
        ...     @staticmethod
        ...     def geometry(module):
        ...         return Geometry(4, 6, (4, 6), transposed=True)
        >>> inventory(nn.Sequential(Dense())).candidates[0].kind
        'dense'
        >>> KINDS.remove(LoRADense)
    """
    kind = row.__dict__.get("kind")
    if not kind or not issubclass(row, Adapted):
        raise LayerError(
            f"register_kind({row.__name__})",
            "it is no Adapted with a kind of its own",
            "Derive from LoRALinear or WeightUpdate and set kind",
        )
    for other in KINDS:
        same = (other.__module__, other.__qualname__) == (row.__module__, row.__qualname__)
        if other.kind == kind and not same:
            raise LayerError(
                f"register_kind({row.__name__})",
                f"kind {kind!r} is taken by {other.__module__}.{other.__qualname__}",
                "Choose another name",
            )
    KINDS[:] = [row, *(other for other in KINDS if other.kind != kind)]
    return row


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's model inside torch.compile's, DistributedDataParallel's and like wrappers.

    Adapters live on the model itself, so every verb means the same on a wrapped model.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif len(model._modules) == 1 and "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
            assert inner is not None
            model = inner
        else:
            return model


def walk(model: nn.Module, *, aliases: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Yield `(canonical name, module)` in the order of the model, the model itself as `""`.

    Args:
        model: The model.
        aliases: Yield a shared module under each of its names, not only under the first.
    """
    model = unwrapped(model)
    known = _WALKS.get((id(model), aliases))
    if known is None and id(model) in _STILL:
        known = _WALKS[id(model), True] = list(_walk(model, aliases=True))
        _WALKS[id(model), False] = list(_first_of_each(known))
        return walk(model, aliases=aliases)
    return iter(_walk(model, aliases) if known is None else known)


def walk_base(model: nn.Module) -> list[tuple[str, nn.Module, dict[str, nn.Parameter]]]:
    """Return `(canonical name, module, its own base parameters)`, each module once."""
    model = unwrapped(model)
    known = _BASES.get(id(model))
    if known is None:
        known = [(name, module, _base_parameters(module)) for name, module in walk(model)]
        if id(model) in _STILL:
            _BASES[id(model)] = known
    return known


# A verb that asks for the same walk many times says with `standing_still` that no module and no
# base parameter comes or goes while it runs.
_STILL: set[int] = set()
_WALKS: dict[tuple[int, bool], list[tuple[str, nn.Module]]] = {}
_BASES: dict[int, list[tuple[str, nn.Module, dict[str, nn.Parameter]]]] = {}


@contextmanager
def standing_still(model: nn.Module) -> Iterator[None]:
    """Walk a model once, however often the body asks; and let no garbage be collected meanwhile.

    A verb makes some dozens of small objects for each site. Python would look through all of them
    again and again for cycles, and take longer over that than over the work.
    """
    model = unwrapped(model)
    if id(model) in _STILL:
        yield
        return
    collecting = gc.isenabled()
    gc.disable()
    _STILL.add(id(model))
    try:
        yield
    finally:
        _STILL.discard(id(model))
        _WALKS.pop((id(model), False), None)
        _WALKS.pop((id(model), True), None)
        _BASES.pop(id(model), None)
        if collecting:
            gc.enable()


def _walk(model: nn.Module, aliases: bool) -> Iterator[tuple[str, nn.Module]]:
    pending: list[tuple[str, nn.Module, int]] = [("", model, 0)]
    seen: set[int] = set()
    while pending:
        name, module, depth = pending.pop()
        if not aliases:
            if id(module) in seen:
                continue
            seen.add(id(module))
        yield name, module
        if children := module._modules:
            if depth == MAX_DEPTH:
                _refuse_endless(name)
            for key, child in reversed(children.items()):
                if child is not None:
                    inside = joined(name, key) if canonical(key) else name
                    pending.append((inside, child, depth + 1))


def _refuse_endless(name: str) -> None:
    """Raise for a module that holds itself: its names would have no end."""
    raise LayerError(
        f"walk the model, module '{name[:80]}...'",
        f"it lies {MAX_DEPTH} modules deep: a module holds one that holds it (its parent?)",
        "Keep such a reference in a tuple, or set it with object.__setattr__; train() and eval() "
        "of torch would not end either",
    )


def _first_of_each(named: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    for item in named:
        if id(item[1]) not in seen:
            seen.add(id(item[1]))
            yield item


def _base_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's own parameters, without its children's and without adapters."""
    own = {key: p for key, p in module._parameters.items() if p is not None}
    if (attached := attached_to(module)) is not None:
        for entry in attached.entries():
            for flat in entry.names.values():
                own.pop(flat, None)
    return own


def inventory(model: nn.Module) -> Inventory:
    """Read off a model every name that a pattern can hit.

    Args:
        model: Any module, also on the meta device.

    Returns:
        Candidates with their kinds and shapes, the reasons against all other names, and the shapes
        of all base parameters.
    """
    return _Survey(model).inventory()


class _Survey:
    """One walk over a model.

    Attributes:
        modules: `(canonical name, module, its parameters)`, each module once.
        further: Module to its names but the first, for modules that have several.
        read: Modules whose weights their parent reads.
        hooked: Whether accelerate has put hooks on the model.
        first: Tensor to its first name.
        tied: Tensor to all its names, for tensors that have several.
    """

    def __init__(self, model: nn.Module) -> None:
        self.further = _further_names(model)
        self.modules = walk_base(model)
        self.read: set[int] = set()
        self.hooked = False
        self.first: dict[int, str] = {}
        self.tied: dict[int, list[str]] = {}
        for name, module, own in self.modules:
            if isinstance(module, READING_PARENTS):
                self.read.update(map(id, module._modules.values()))
            self.hooked = self.hooked or "_hf_hook" in module.__dict__
            for key, parameter in own.items():
                full = joined(name, key)
                first = self.first.setdefault(id(parameter), full)
                if first is not full:
                    self.tied.setdefault(id(parameter), [first]).append(full)
        self.candidates: list[Candidate] = []
        self.others: dict[str, str] = {}
        self.parameters: dict[str, tuple[int, ...]] = {}
        self.stock: dict[tuple[type, type], bool] = {}

    def inventory(self) -> Inventory:
        for name, module, own in self.modules:
            self._module(name, module, own)
        return Inventory(
            candidates=tuple(self.candidates),
            others=self.others,
            parameters=self.parameters,
            aliases=self._first_names(),
        )

    def _first_names(self) -> dict[str, str]:
        """Return every further name of a parameter, with the one that it is listed under."""
        first = {name: names[0] for names in self.tied.values() for name in names[1:]}
        for name, module, own in self.modules if self.further else ():
            for alias in self.further.get(id(module), ()):
                for key in own:
                    full = joined(name, key)
                    first[joined(alias, key)] = first.get(full, full)
        return first

    def _module(self, name: str, module: nn.Module, own: dict[str, nn.Parameter]) -> None:
        row = _row_of(module)
        if row is not None:
            self.candidates.append(self._candidate(name, module, row, own))
        elif isinstance(module, nn.RNNBase) and name:
            cls = plain_class(type(module)).__name__
            refusal = _fused_kernel(module)
            self.candidates.append(Candidate(name, cls, 0, 0, (), "", refusal=refusal))
        elif isinstance(module, nn.MultiheadAttention) and name:
            self.candidates.append(self._attention(name, module, own))
        else:
            container = bool(module._modules)
            self.others[name] = "container" if container else plain_class(type(module)).__name__
        for key, parameter in own.items():
            full = joined(name, key)
            if self.first[id(parameter)] == full:
                self.parameters[full] = _shape(parameter)
            if row is None or key != row.weight_name:
                self._parameter(full, module, key, parameter)

    def _candidate(
        self, name: str, module: nn.Module, row: type[Adapted], own: dict[str, nn.Parameter]
    ) -> Candidate:
        shapes = row.geometry(module)
        weight = own.get(row.weight_name)
        full = joined(name, row.weight_name)
        refusal = self._refusal(module, row.weight_name, weight)
        forward = refusal is not None or self._adds_to_output(module, row, weight)
        return Candidate(
            name=name,
            kind=row.kind,
            in_features=shapes.in_features,
            out_features=shapes.out_features,
            weight_shape=shapes.weight_shape,
            transposed=shapes.transposed,
            experts=shapes.experts,
            weight=full,
            aliases=self.further.get(id(module), ()),
            tied=self._tied(full, weight),
            refusal=refusal,
            update="forward" if forward else "weight",
            dtype="" if weight is None else _dtype(weight.dtype),
        )

    def _attention(
        self, name: str, module: nn.MultiheadAttention, own: dict[str, nn.Parameter]
    ) -> Candidate:
        """Whoever names an attention module means its projections, which it reads."""
        keys = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        members = tuple(joined(name, key) for key in (*filter(own.__contains__, keys), "out_proj"))
        width = int(module.embed_dim)
        aliases = self.further.get(id(module), ())
        return Candidate(
            name,
            "attention",
            width,
            width,
            (),
            "",
            aliases=aliases,
            members=members,
            update="weight",
        )

    def _parameter(self, full: str, module: nn.Module, key: str, parameter: nn.Parameter) -> None:
        n_dims = len(_shape(parameter))
        if (n_dims < 2 and not nn.parameter.is_lazy(parameter)) or is_bias(key):
            self.others[full] = "bias" if is_bias(key) else f"{n_dims}-d parameter"
            return
        shapes = _raw_geometry(parameter)
        owner = full.rpartition(".")[0]
        self.candidates.append(
            Candidate(
                name=full,
                kind="parameter",
                in_features=shapes.in_features,
                out_features=shapes.out_features,
                weight_shape=shapes.weight_shape,
                weight=full,
                experts=shapes.experts,
                owner=owner,
                aliases=tuple(joined(alias, key) for alias in self.further.get(id(module), ())),
                tied=self._tied(full, parameter),
                refusal=_fused_kernel(module) or self._refusal(module, key, parameter),
                needs_layout=n_dims > 2,
                update="weight",
                dtype=_dtype(parameter.dtype),
            )
        )

    def _tied(self, full: str, parameter: nn.Parameter | None) -> tuple[str, ...]:
        names = self.tied.get(id(parameter)) if self.tied else None
        return () if names is None else tuple(name for name in names if name != full)

    def _adds_to_output(
        self, module: nn.Module, row: type[Adapted], weight: nn.Parameter | None
    ) -> bool:
        """Whether adding to the module's output is right; else its weight is mounted."""
        if (
            issubclass(row, WeightUpdate)
            or id(module) in self.read
            or not row.adds_to_output(module)
        ):
            return False
        cls = type(module)
        stock = self.stock.get((cls, row))
        if stock is None:
            stock = self.stock[cls, row] = row.stock(plain_class(cls))
        if stock:
            return True
        if weight is None or not weight.is_floating_point() or type(weight) is not nn.Parameter:
            return True  # quantised: the class itself multiplies by what W stands for
        ids = issubclass(row, LoRAEmbedding)
        return linear_in_weight(module, row.geometry(module).transposed, ids, row.weight_name)

    def _refusal(
        self, module: nn.Module, key: str, parameter: nn.Parameter | None
    ) -> tuple[str, str] | None:
        cls = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            return f"{cls} is a ScriptModule, whose class cannot change", "Inject before scripting"
        if "parametrizations" in module._modules:
            return (
                f"the weight of {cls} is parametrised, so that a merge would write to a temporary",
                "Call torch.nn.utils.parametrize.remove_parametrizations first",
            )
        if parameter is None:
            return (
                f"{cls} holds no parameter {key!r} of its own (weight_norm?)",
                "Remove what computes it first",
            )
        if nn.parameter.is_lazy(parameter):
            return f"{cls} is lazy and not initialised", "Run the model once first"
        if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
            return (
                f"this {cls} has its own forward on the instance, which would hide the adapter",
                "Inject before patching the module, or remove the patch",
            )
        if self.hooked and parameter.device.type == "meta":
            return (
                "accelerate has offloaded its weights",
                "Inject before dispatch_model, or load the model without offload",
            )
        return None


def _row_of(module: nn.Module) -> type[Adapted] | None:
    """Return the first row that matches a module."""
    for row in KINDS:
        if row.matches(module):
            return row
    return None


def _further_names(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return the names of shared modules but the first, by identity."""
    seen: set[int] = set()
    further: dict[int, tuple[str, ...]] = {}
    for name, module in walk(model, aliases=True):
        if id(module) in seen:
            further[id(module)] = (*further.get(id(module), ()), name)
        seen.add(id(module))
    return further


def _fused_kernel(module: nn.Module) -> tuple[str, str] | None:
    if not isinstance(module, nn.RNNBase):
        return None
    found = (
        f"{type(module).__name__} hands its weights to a fused kernel in a list of its own, so "
        "that an adapted one would not be read"
    )
    return found, "Adapt the layers around it"


@functools.cache
def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return () if nn.parameter.is_lazy(parameter) else tuple(parameter.shape)


def _raw_geometry(parameter: nn.Parameter) -> Geometry:
    shape = _shape(parameter)
    if len(shape) < 2:
        return Geometry(0, 0, shape)
    if len(shape) == 2:
        return Geometry(shape[1], shape[0], shape)
    return Geometry(shape[-1], shape[-2], shape, experts=math.prod(shape[:-2]))


def check_swappable(module: nn.Module, asked: str) -> None:
    """Check that a module's class can change, by making the class and asking Python.

    Args:
        module: The module; left as it is.
        asked: What was asked, for the message.

    Raises:
        LayerError: It cannot.
    """
    cls = type(module)
    if cls in _SWAPPABLE or issubclass(cls, Adapted):
        return
    try:
        module.__class__ = adapted_class(cls, WeightUpdate, ())
        module.__class__ = cls
    except TypeError as error:
        raise LayerError(
            asked, f"the class of a {cls.__name__} cannot change ({error})", "Leave it out"
        ) from error
    _SWAPPABLE.add(cls)


_SWAPPABLE: set[type] = set()
