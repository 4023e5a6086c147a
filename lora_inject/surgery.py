"""Inject and eject: adapters onto a live model and off it again, exactly.

One idea: everything that can go wrong goes wrong before the first change. `mount` first finds every
module, checks every name and makes every tensor; only then does it change classes, and a failure
even there takes back what was done. The model is the only state: what was injected is read off its
modules, and one small record on the root remembers what `eject` must restore.

What is not here: choosing among adapters (`switching`), folding them (`merging`), files
(`formats`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lora_inject.config import Config
from lora_inject.errors import LayerError, StateError, nearest
from lora_inject.functional import master_dtype
from lora_inject.layers.base import (
    TRAINABLE_ROLES,
    Entry,
    Reader,
    attribute,
    mounts_of,
    narrow,
    swap,
    unswap,
)
from lora_inject.layers.initial import FROM_WEIGHT, initial_tensors
from lora_inject.layers.loading import allow_loading
from lora_inject.layers.resizing import allow_resizing, refuse_resizing
from lora_inject.layers.selection import Selection, State
from lora_inject.layers.snapshot import all_or_nothing
from lora_inject.layers.table import (
    check_swappable,
    inventory,
    mixin_for,
    standing_still,
    unwrapped,
    walk,
    walk_base,
)
from lora_inject.matching import resolve
from lora_inject.plans import Plan, Trained
from lora_inject.sites import SiteSpec

__all__ = [
    "AdapterInfo",
    "Root",
    "adapter_parameters",
    "adapters",
    "carriers",
    "check_names",
    "check_new_name",
    "eject",
    "entries",
    "holders",
    "inject",
    "missed_sites",
    "mount",
    "named_parameters",
    "parameter_groups",
    "plan",
    "reach",
    "refuse_merged",
    "roots_of",
    "summary",
    "train_only",
]

Tensors = Mapping[str, Tensor]
M = TypeVar("M", bound=nn.Module)

ROOT = "_lora_root"


@dataclass
class Root:
    """What the root of an injected model remembers.

    Attributes:
        selection: The cell that all its layers share.
        configs: Adapter name to the config it was injected with, as plain data, or None.
        required_grad: Names of base parameters that required a gradient before the first inject.
        undo: What `unmerge` restores while the model is merged; owned by `merging`.
        kept: A walk of the model and the generation that it belongs to; see `reach`.
        sampled: A fingerprint of the base and what it was taken of; owned by `swapping`.
    """

    selection: Selection
    configs: dict[str, Mapping[str, Any] | None] = field(default_factory=dict)
    required_grad: set[str] = field(default_factory=set)
    undo: Any = None
    kept: tuple[int, Reach] | None = None
    sampled: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy carries: what was read off another model is of no use to it."""
        return {**self.__dict__, "kept": None, "sampled": None}


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter on a model, as `adapters` lists it.

    Attributes:
        sites: Site name to its spec.
        trained: Names of the base tensors of which the adapter has full copies.
        n_parameters: Elements of all its trainable tensors.
        weight: Its mixing weight in the current selection, None where it is not active.
        trainable: Whether its tensors require gradients.
    """

    sites: Mapping[str, SiteSpec]
    trained: tuple[str, ...]
    n_parameters: int
    weight: float | None
    trainable: bool

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        return tuple(sorted({spec.rank for spec in self.sites.values()}))

    @property
    def active(self) -> bool:
        """Whether the adapter takes part in a forward."""
        return self.weight is not None


def plan(model: nn.Module, config: Config | Mapping[str, Any] | str | PathLike[str]) -> Plan:
    r"""Say what `inject` would do, and change nothing.

    Args:
        model: Any module, also on the meta device.
        config: A `Config`, a dict, or the path of a YAML file.

    Returns:
        The plan; `print(plan)` shows it as a table.

    Raises:
        ConfigError: The config is not valid.
        MatchError: A pattern matches nothing, or `expect` is missed.
        LayerError: A matched module cannot carry an adapter.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plan(net, {"rank": 2, "targets": [r"\d"]}).n_lora
        44
    """
    return resolve(Config.coerce(config), inventory(model))


def inject(
    model: M,
    config: Config | Mapping[str, Any] | str | PathLike[str],
    name: str = "default",
    *,
    probe: Callable[[], Any] | None = None,
) -> M:
    """Put a new adapter onto a model, in place, and freeze everything else.

    The adapter becomes the only active and the only trainable one; others keep their values.

    Args:
        model: Any module; stays the same object.
        config: A `Config`, a dict, or the path of a YAML file.
        name: Name of the adapter.
        probe: Runs the model once, for instance `lambda: model(**batch)`. With it a site that the
            run does not reach, whose adapter would be inert, is an error.

    Returns:
        The same object, for chaining.

    Raises:
        ConfigError: The config is not valid.
        MatchError: A pattern matches nothing, or `expect` is missed.
        LayerError: A matched module cannot carry an adapter, or `probe` does not reach it.
        StateError: The name is in use, or the model is merged.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = inject(net, {"rank": 2, "targets": ["0"]})
        >>> sorted(n for n, p in net.named_parameters() if p.requires_grad)
        ['0.lora_A__default', '0.lora_B__default']
    """
    config = Config.coerce(config)
    with standing_still(model):
        planned = plan(model, config)
        mount(model, name, planned.sites, planned.trained, _initial, config.to_dict(), probe=probe)
    return model


def _initial(target: SiteSpec | Trained, weight: Tensor) -> dict[str, Tensor]:
    """Make the tensors of a new adapter."""
    if isinstance(target, SiteSpec):
        return initial_tensors(target, weight)
    return {"T": weight.detach().to(master_dtype(weight.dtype), copy=True)}


def mount(
    model: nn.Module,
    name: str,
    sites: Iterable[SiteSpec],
    trained: Iterable[Trained],
    make: Callable[[SiteSpec | Trained, Tensor], Tensors],
    config: Mapping[str, Any] | None,
    *,
    activate: bool = True,
    train: bool = True,
    probe: Callable[[], Any] | None = None,
) -> None:
    """Put an adapter onto a model: check everything, make everything, then change.

    Args:
        model: The root.
        name: Name of the new adapter.
        sites: Its sites.
        trained: The base tensors of which it has full copies.
        make: Called with a site or a trained tensor and the frozen weight; returns role to tensor.
        config: What the adapter was made from, as plain data.
        activate: Whether it becomes the only active adapter.
        train: Whether it becomes the only trainable adapter; else it is frozen.
        probe: Runs the model; sites that it does not reach are refused.

    Raises:
        StateError: The name is in use, or the model is merged.
        LayerError: A module cannot change its class, an attribute is in the way, or a site is not
            reached by `probe`.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise LayerError(
            f"adapter {name!r}",
            "the model is wrapped in DistributedDataParallel, which would not reduce its gradients",
            "Inject into the model first, then wrap it",
        )
    model = unwrapped(model)
    with standing_still(model):
        _mount(model, name, tuple(sites), tuple(trained), make, config, activate, train, probe)


def _mount(
    model: nn.Module,
    name: str,
    sites: tuple[SiteSpec, ...],
    trained: tuple[Trained, ...],
    make: Callable[[SiteSpec | Trained, Tensor], Tensors],
    config: Mapping[str, Any] | None,
    activate: bool,
    train: bool,
    probe: Callable[[], Any] | None,
) -> None:
    found = reach(model)
    check_new_name(found, name)
    placed = _place(model, name, sites, trained)
    made = _make(placed, make, train)
    selection = next(iter(found.selections), None) or Selection()
    records = roots_of(model).values()
    with all_or_nothing(
        (module for _, module in walk(model)), (selection, *found.selections, *records)
    ):
        root = _become_root(model, selection)
        root.configs[name] = config
        _freeze(model, root)
        if train:
            train_only(model, None)  # the new tensors are made trainable
        for place, parameters in zip(placed, made, strict=True):
            _attach(place, parameters, selection)
        refuse_resizing((module for _, module in walk(model)), carriers(model).values())
        _structure_changed()
        if activate:
            selection.replace(State(active=((name, 1.0),)))
        if probe is not None:
            _refuse_unreached(model, probe)


def _refuse_unreached(model: nn.Module, probe: Callable[[], Any]) -> None:
    training = {id(module): module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            missed = missed_sites(model, probe)
    finally:
        for module in model.modules():
            module.training = training[id(module)]
    if missed:
        some = ", ".join(map(repr, missed[:3]))
        weight = missed[0] if missed[0].endswith("weight") else f"{missed[0]}.weight"
        raise LayerError(
            f"inject, site {missed[0]!r}",
            f"the probe reached its layer at no point ({len(missed)} such sites: {some}): its "
            "adapter would be inert",
            f"Where a parent reads the weight instead of calling the layer, target the weight: "
            f"'{re.escape(weight)}'; else leave it out",
        )


def missed_sites(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Return the sites of active adapters that took no part when `run()` ran the model."""
    selections = reach(model).selections
    active = {name for selection in selections for name in selection.state.names}
    seen: set[tuple[int, str | None]] = set()
    for selection in selections:
        selection.witness = seen
    try:
        run()
    finally:
        for selection in selections:
            selection.witness = None
    return [
        entry.spec.name if entry.spec is not None else _join(path, entry.param)
        for path, module, entry in entries(model)
        if entry.adapter in active and (id(module), _read_param(module, entry)) not in seen
    ]


def _read_param(module: nn.Module, entry: Entry) -> str | None:
    """Return the parameter by whose reading an entry takes part, None for a forward mount."""
    mounts = mounts_of(module)
    assert mounts is not None
    return None if mounts.forward.get(entry.adapter) is entry else entry.param


def _make(
    placed: Iterable[_Placed], make: Callable[[SiteSpec | Trained, Tensor], Tensors], train: bool
) -> list[dict[str, nn.Parameter]]:
    """Make the Parameters of each place; a copy of a tied tensor is made once."""
    made: dict[str, dict[str, nn.Parameter]] = {}
    for place in placed:
        if place.target.name not in made:
            made[place.target.name] = {
                role: nn.Parameter(tensor, train and role in TRAINABLE_ROLES)
                for role, tensor in make(place.target, place.weight).items()
            }
    return [made[place.target.name] for place in placed]


class _Placed(NamedTuple):
    """Where one tensor of a new adapter goes."""

    target: SiteSpec | Trained
    module: nn.Module
    entry: Entry
    forward: bool

    @property
    def weight(self) -> Tensor:
        found = self.module._parameters[self.entry.param]
        assert found is not None
        return found


def check_new_name(found: Reach, name: str) -> None:
    """Check that an adapter of that name can be added now, to a model with these adapters.

    Raises:
        StateError: The name is in use or no name, or the model is merged.
    """
    asked = f"adapter {name!r}"
    if not isinstance(name, str) or not name:
        raise StateError(asked, "a name is a string of one character or more", "Give another name")
    if name in found.names:
        raise StateError(
            asked, "the model has one of that name", "Eject it, or choose another name"
        )
    for selection in found.selections:
        selection.check_settled(f"adding adapter {name!r}")
        refuse_merged(selection, f"adding adapter {name!r}")


def refuse_merged(selection: Selection, asked: str) -> None:
    """Raise where the weights hold a merged adapter.

    Raises:
        StateError: They do.
    """
    if selection.merged is not None:
        merged = ", ".join(name for name, _ in selection.merged.active)
        raise StateError(
            asked, f"{merged!r} is merged into the weights", "Call unmerge(model) first"
        )


def _place(
    model: nn.Module, name: str, sites: tuple[SiteSpec, ...], trained: tuple[Trained, ...]
) -> list[_Placed]:
    """Find the module of each tensor and check that it can carry it; change nothing."""
    modules = dict(walk(model, aliases=True))
    placed = []
    flat: dict[tuple[str | None, bool], dict[str, str]] = {}  # shared by all sites alike
    for spec in sites:
        forward = spec.mount == "forward"
        owner, _, param = spec.weight.rpartition(".")
        read = None if forward else param
        names = flat.get((read, spec.init in FROM_WEIGHT))
        if names is None:
            derived = spec.init in FROM_WEIGHT
            roles = ("A", "B", "A0", "B0") if derived else ("A", "B")
            names = flat[read, derived] = {role: attribute(role, name, read) for role in roles}
        entry = Entry(name, spec, param, names)
        placed.append(_Placed(spec, modules[owner], entry, forward))
    held = holders(model) if trained else {}
    for extra in trained:
        owner, _, key = extra.name.rpartition(".")
        # A tied tensor is one tensor: its copy is read under all its names.
        for module, param in held[id(modules[owner]._parameters[key])]:
            names = {"T": attribute("T", name, param)}
            entry = Entry(name, None, param, names, extra.why)
            placed.append(_Placed(extra, module, entry, forward=False))
    for place in placed:
        _check_place(place)
    return placed


def holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return who holds each parameter: more than one holder means that it is tied."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, key))
    return holders


def _check_place(place: _Placed) -> None:
    target = f"site {place.target.name!r}"
    module = place.module
    for flat in place.entry.names.values():
        if flat in module.__dict__ or flat in module._modules or hasattr(type(module), flat):
            taken = True
        else:
            taken = flat in module._parameters or flat in module._buffers
        if taken:
            raise LayerError(
                target, f"the module has an attribute {flat!r}", "Choose another adapter name"
            )
    if not place.forward and mounts_of(module) is None and hasattr(type(module), place.entry.param):
        raise LayerError(
            target,
            f"{type(module).__name__}.{place.entry.param} is computed by the class",
            "A parameter that is itself computed cannot be mounted",
        )
    spec = place.target
    reads = not place.forward or (isinstance(spec, SiteSpec) and spec.init in FROM_WEIGHT)
    if reads and _is_quantised(place.weight):
        init = spec.init if isinstance(spec, SiteSpec) else ""
        reader = f"init {init}" if place.forward else "a weight mount"
        raise LayerError(
            target,
            f"{reader} reads its values, and they are quantised ({type(place.weight).__name__})",
            "Name the layer rather than its weight, with an init that does not start from W",
        )
    check_swappable(module, target)


def _is_quantised(weight: Tensor) -> bool:
    plain = weight.is_floating_point() and weight.element_size() >= 2
    # FSDP2's sharded tensors are plain; their class is known by name, for its import takes seconds.
    return not plain or not (type(weight) is nn.Parameter or type(weight).__name__ == "DTensor")


def _attach(place: _Placed, parameters: Mapping[str, nn.Parameter], selection: Selection) -> None:
    entry, module, target = place.entry, place.module, place.target
    forward = place.forward and isinstance(target, SiteSpec)
    mixin = mixin_for(target.kind) if forward else Reader  # type: ignore[union-attr]
    mounts = swap(module, selection, mixin, () if place.forward else (entry.param,))
    for role, flat in entry.names.items():
        module._parameters[flat] = parameters[role]
    mounts.add(entry, forward=place.forward)


def _detach(module: nn.Module, name: str | None) -> None:
    """Take an adapter, or all, off one module; the last one gives the class back."""
    mounts = mounts_of(module)
    if mounts is None:
        return
    names = {e.adapter for e in mounts.entries()} if name is None else {name}
    for entry in [e for n in names for e in mounts.remove(n)]:
        for flat in entry.names.values():
            module._parameters.pop(flat, None)
    if any(True for _ in mounts.entries()):
        narrow(module)
    else:
        unswap(module)


def eject(model: M, name: str | None = None) -> M:
    """Take one adapter, or all, off a model again.

    Objects, classes, keys, their order, values and `requires_grad` flags are what they were before
    the first inject. Ejecting all adapters of a merged model leaves the merged weights.

    Args:
        model: The root, or any module that holds roots.
        name: The adapter; all of them by default.

    Returns:
        The same object.

    Raises:
        StateError: There is no such adapter, or it is merged together with others.
    """
    wrapped, model = model, unwrapped(model)  # type: ignore[assignment]
    found = reach(model)
    check_names(found.names, [] if name is None else [name], "eject")
    with standing_still(model):
        _eject(model, name, found)
    return wrapped


def _eject(model: nn.Module, name: str | None, found: Reach) -> None:
    for selection in found.selections:
        selection.check_settled("eject")
        if name is not None:
            refuse_merged(selection, f"ejecting {name!r}")
    modules = dict(walk(model))
    roots = roots_of(model)
    with all_or_nothing(modules.values(), (*found.selections, *roots.values())):
        for module in carriers(model).values():
            _detach(module, name)
        _structure_changed()
        left = reach(model).names
        for path, root in reversed(roots.items()):
            _forget(modules[path], root, left)


def _forget(module: nn.Module, root: Root, left: frozenset[str]) -> None:
    """Drop what is gone from a root's record; without adapters the record goes too."""
    gone = set(root.configs) - left
    for name in gone:
        del root.configs[name]
    root.selection.forget(gone)
    active = tuple(item for item in root.selection.state.active if item[0] not in gone)
    if active != root.selection.state.active:
        root.selection.replace(State(active=active))
    allow_resizing((inner for _, inner in walk(module)), carriers(module).values())
    if root.configs:
        return
    root.selection.merged = None
    allow_loading(module)
    del module.__dict__[ROOT]
    inner = roots_of(module)
    for key, parameter in named_parameters(module):
        if key not in root.required_grad:
            continue
        for path, record in inner.items():
            if key.startswith(path + "."):
                record.required_grad.add(key.removeprefix(path + "."))
                break
        else:
            parameter.requires_grad_(True)


def _become_root(model: nn.Module, selection: Selection) -> Root:
    """Make `model` the root of all adapters inside: one record, one selection."""
    root: Root | None = model.__dict__.get(ROOT)
    if root is None:
        root = model.__dict__[ROOT] = Root(selection)
    active = dict(selection.state.active)
    modules = dict(walk(model))
    for path, inner in roots_of(model).items():
        if inner is root:
            continue
        module = modules[path]
        active.update(inner.selection.state.active)
        root.configs.update(inner.configs)
        root.required_grad |= {f"{path}.{key}" for key in inner.required_grad}
        del module.__dict__[ROOT]
    for module in carriers(model).values():
        mounts = mounts_of(module)
        assert mounts is not None
        mounts.selection = selection
    if active != dict(selection.state.active):
        selection.replace(State(active=tuple(active.items())))
    return root


def _freeze(model: nn.Module, root: Root) -> None:
    """Freeze every base parameter and remember which ones were not."""
    for path, _, own in walk_base(model):
        for key, parameter in own.items():
            if parameter.requires_grad:
                root.required_grad.add(_join(path, key))
                parameter.requires_grad_(False)


# --------------------------------------------------------------------------------- what is there


def carriers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that carry adapters, by canonical name, in the order of the model."""
    return {name: module for name, module in walk(model) if "_lora" in module.__dict__}


def entries(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, nn.Module, Entry]]:
    """Yield `(module name, module, entry)` of one adapter, or of all."""
    for path, module in walk(model):
        mounts = mounts_of(module)
        for entry in mounts.entries() if mounts is not None else ():
            if name is None or entry.adapter == name:
                yield path, module, entry


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every base parameter once, by canonical name; adapters are left out."""
    seen: set[int] = set()
    for path, _, own in walk_base(model):
        for key, parameter in own.items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{key}" if path else key, parameter


def roots_of(model: nn.Module) -> dict[str, Root]:
    """Return the records of all injected roots in a model, by name; `""` is the model itself."""
    return {name: module.__dict__[ROOT] for name, module in walk(model) if ROOT in module.__dict__}


@dataclass(frozen=True)
class Reach:
    """What a verb on a model reaches.

    Attributes:
        selections: The distinct selections of all layers inside.
        names: The adapters that they carry.
    """

    selections: tuple[Selection, ...]
    names: frozenset[str]


_generation = 0


def _structure_changed() -> None:
    global _generation  # noqa: PLW0603 - counts inject and eject, so that roots can keep a walk
    _generation += 1


def reach(model: nn.Module) -> Reach:
    """Return the selections and adapters in a model.

    The walk is kept on the root until somebody injects or ejects, so that switching does not
    depend on the size of the model.
    """
    model = unwrapped(model)
    root: Root | None = model.__dict__.get(ROOT)
    if root is not None and root.kept is not None and root.kept[0] == _generation:
        return root.kept[1]
    selections: dict[int, Selection] = {}
    names: set[str] = set()
    for module in carriers(model).values():
        mounts = mounts_of(module)
        assert mounts is not None
        selections.setdefault(id(mounts.selection), mounts.selection)
        names.update(entry.adapter for entry in mounts.entries())
    found = Reach(tuple(selections.values()), frozenset(names))
    if root is not None:
        root.kept = (_generation, found)
    return found


def check_names(known: frozenset[str], names: Iterable[str], verb: str) -> None:
    """Raise where a name is no adapter of the model.

    Raises:
        StateError: A name is unknown; the message lists what there is.
    """
    for name in names:
        if name not in known:
            there = ", ".join(map(repr, sorted(known))) or "none"
            close = nearest(str(name), known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else "Inject or load it first"
            raise StateError(f"{verb} {name!r}", f"the model's adapters are: {there}", hint)


def adapters(model: nn.Module) -> dict[str, AdapterInfo]:
    """List the adapters on a model.

    Returns:
        Adapter name to what it is, in the order of injection.

    Example:
        >>> net = inject(nn.Sequential(nn.Linear(4, 4)), {"rank": 1, "targets": ["0"]}, "sql")
        >>> adapters(net)["sql"].n_parameters
        8
    """
    found: dict[str, list[tuple[str, nn.Module, Entry]]] = {}
    for item in entries(model):
        found.setdefault(item[2].adapter, []).append(item)
    weights: dict[str, float] = {}
    for selection in reach(model).selections:
        weights.update((selection.merged or selection.state).active)
    order = {name: i for root in roots_of(model).values() for i, name in enumerate(root.configs)}
    names = sorted(found, key=lambda name: order.get(name, len(order)))
    return {name: _info(found[name], weights.get(name)) for name in names}


def _info(items: list[tuple[str, nn.Module, Entry]], weight: float | None) -> AdapterInfo:
    tensors = [e.tensor(m, r) for _, m, e in items for r in e.names if r in TRAINABLE_ROLES]
    return AdapterInfo(
        sites={e.spec.name: e.spec for _, _, e in items if e.spec is not None},
        trained=tuple(_join(path, e.param) for path, _, e in items if e.spec is None),
        n_parameters=sum(t.numel() for t in {id(t): t for t in tensors}.values()),
        weight=weight,
        trainable=any(t.requires_grad for t in tensors),
    )


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def summary(model: nn.Module) -> str:
    """Return the adapters of a model as a plain text table."""
    rows = [("adapter", "sites", "ranks", "trained", "parameters", "weight", "trainable")]
    for name, info in adapters(model).items():
        ranks = ", ".join(map(str, info.ranks)) or "-"
        weight = "-" if info.weight is None else f"{info.weight:g}"
        rows.append(
            (
                name,
                str(len(info.sites)),
                ranks,
                str(len(info.trained)),
                f"{info.n_parameters:,}",
                weight,
                "yes" if info.trainable else "no",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def adapter_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """Return the trainable tensors of one adapter, or of all.

    Args:
        model: The model.
        name: The adapter. By default all of them, and then the keys begin with `NAME:` where there
            is more than one.

    Returns:
        `SITE.lora_A`, `SITE.lora_B` and the names of trained base tensors, to the Parameters. Ask
        again after `.to()` or sharding: those may put new Parameters in place.

    Raises:
        StateError: There is no such adapter.
    """
    known = reach(model).names
    check_names(known, [] if name is None else [name], "adapter_parameters of")
    found: dict[str, nn.Parameter] = {}
    for path, module, entry in entries(model, name):
        prefix = f"{entry.adapter}:" if name is None and len(known) > 1 else ""
        for role, flat in entry.names.items():
            if role not in TRAINABLE_ROLES:
                continue
            key = (
                _join(path, entry.param) if entry.spec is None else f"{entry.spec.name}.lora_{role}"
            )
            parameter = module._parameters[flat]
            assert parameter is not None
            found[prefix + key] = parameter
    return found


def parameter_groups(model: nn.Module, lr: float, b_lr_ratio: float = 1.0) -> list[dict[str, Any]]:
    """Return optimiser groups over the trainable adapters.

    Args:
        model: The model.
        lr: Learning rate of A and of trained base tensors.
        b_lr_ratio: Learning rate of B over that of A; 16 is what LoRA+ (arXiv:2402.12354) advises.

    Returns:
        Groups with `params`, `lr` and a `name`, for any torch optimiser. Empty groups are left out.

    Raises:
        StateError: No adapter is trainable.
    """
    # By identity: the copy of a tied tensor stands under each of its names.
    groups: dict[str, dict[int, nn.Parameter]] = {"A": {}, "B": {}, "T": {}}
    for _, module, entry in entries(model):
        for role, flat in entry.names.items():
            parameter = module._parameters[flat]
            if role in groups and parameter is not None and parameter.requires_grad:
                groups[role][id(parameter)] = parameter
    if not any(groups.values()):
        raise StateError(
            "parameter_groups",
            "no adapter of the model is trainable",
            "Call train_only(model, name)",
        )
    rates = {"A": lr, "B": lr * b_lr_ratio, "T": lr}
    return [
        {"params": list(parameters.values()), "lr": rates[role], "name": f"lora_{role}"}
        for role, parameters in groups.items()
        if parameters
    ]


def train_only(model: nn.Module, names: str | Iterable[str] | None) -> None:
    """Say which adapters require gradients; all others, and the base, do not.

    Args:
        model: The model.
        names: One adapter, several, or None for none.

    Raises:
        StateError: A name is unknown, or the model is merged.
    """
    wanted = {names} if isinstance(names, str) else set(names or ())
    found = reach(model)
    check_names(found.names, wanted, "train_only")
    for selection in found.selections:
        refuse_merged(selection, "train_only")
    for selection in found.selections:
        selection.trained = frozenset(wanted)
    for _, module, entry in entries(model):
        for role, flat in entry.names.items():
            parameter = module._parameters[flat]
            if role in TRAINABLE_ROLES and parameter is not None:
                parameter.requires_grad_(entry.adapter in wanted)
