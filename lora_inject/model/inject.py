"""Inject and eject: adapters onto a live model and off it again, exactly.

Everything that can go wrong goes wrong before the first change. `attach` first finds every module,
checks every name and makes every tensor; only then does it change classes, and a failure even there
takes back what was done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from lora_inject.errors import LayerError
from lora_inject.functional import master_dtype
from lora_inject.layers.adapted import WeightUpdate
from lora_inject.layers.attached import TRAINABLE_ROLES, Entry, attached_to, attribute
from lora_inject.layers.candidates import inventory
from lora_inject.layers.class_swap import check_swappable, narrow, swap, unswap
from lora_inject.layers.initial import FROM_WEIGHT, initial_tensors
from lora_inject.layers.kinds import mixin_for
from lora_inject.layers.resizing import allow_resizing, refuse_resizing
from lora_inject.layers.selection import Selection, State
from lora_inject.layers.snapshot import all_or_nothing
from lora_inject.layers.state_dict import allow_loading
from lora_inject.layers.survey import Survey
from lora_inject.model.carried import (
    ROOT,
    Root,
    adapted_modules,
    check_names,
    check_new_name,
    reach,
    refuse_merged,
    roots_of,
    structure_changed,
)
from lora_inject.model.reached import refuse_unreached
from lora_inject.model.train import set_trained
from lora_inject.spec.config import Config
from lora_inject.spec.matching import resolve
from lora_inject.spec.names import joined
from lora_inject.spec.plan import Plan, Trained
from lora_inject.spec.sites import SiteSpec

Tensors = Mapping[str, Tensor]
M = TypeVar("M", bound=nn.Module)


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
    return resolve(Config.coerce(config), inventory(Survey(model)))


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
    survey = Survey(model)
    planned = resolve(config, inventory(survey))
    attach(survey, name, planned.sites, planned.trained, _initial, config.to_dict(), probe=probe)
    return model


def _initial(target: SiteSpec | Trained, weight: Tensor) -> dict[str, Tensor]:
    """Make the tensors of a new adapter."""
    if isinstance(target, SiteSpec):
        return initial_tensors(target, weight)
    return {"T": weight.detach().to(master_dtype(weight.dtype), copy=True)}


def attach(
    survey: Survey,
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
        survey: Of the root.
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
    if isinstance(survey.given, nn.parallel.DistributedDataParallel):
        raise LayerError(
            f"adapter {name!r}",
            "the model is wrapped in DistributedDataParallel, which would not reduce its gradients",
            "Inject into the model first, then wrap it",
        )
    found = reach(survey.model, survey)
    check_new_name(found, name)
    placed = _place(survey, name, tuple(sites), tuple(trained))
    made = _make(placed, make, train)
    selection = next(iter(found.selections), None) or Selection()
    modules = [module for _, module in survey.modules]
    records = roots_of(survey).values()
    with all_or_nothing(modules, (selection, *found.selections, *records)):
        root = _become_root(survey, selection)
        root.configs[name] = config
        _freeze(survey, root)
        if train:
            set_trained(survey, ())  # the new tensors are made trainable
        for place, parameters in zip(placed, made, strict=True):
            _attach(place, parameters, selection)
        refuse_resizing(modules, adapted_modules(survey).values())
        structure_changed()
        if activate:
            selection.replace(State(active=((name, 1.0),)))
        if probe is not None:
            refuse_unreached(survey.model, probe)


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


def _place(
    survey: Survey, name: str, sites: tuple[SiteSpec, ...], trained: tuple[Trained, ...]
) -> list[_Placed]:
    """Find the module of each tensor and check that it can carry it; change nothing."""
    modules = survey.by_name
    placed = []
    flat: dict[tuple[str | None, bool], dict[str, str]] = {}  # shared by all sites alike
    for spec in sites:
        forward = spec.update == "forward"
        owner, _, param = spec.weight.rpartition(".")
        read = None if forward else param
        names = flat.get((read, spec.init in FROM_WEIGHT))
        if names is None:
            derived = spec.init in FROM_WEIGHT
            roles = ("A", "B", "A0", "B0") if derived else ("A", "B")
            names = flat[read, derived] = {role: attribute(role, name, read) for role in roles}
        entry = Entry(name, spec, param, names)
        placed.append(_Placed(spec, modules[owner], entry, forward))
    for extra in trained:
        owner, _, key = extra.name.rpartition(".")
        # A tied tensor is one tensor: its copy is read under all its names.
        for module, param in survey.holders[id(modules[owner]._parameters[key])]:
            names = {"T": attribute("T", name, param)}
            entry = Entry(name, None, param, names, extra.why)
            placed.append(_Placed(extra, module, entry, forward=False))
    for place in placed:
        _check_place(place)
    return placed


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
    if (
        not place.forward
        and attached_to(module) is None
        and hasattr(type(module), place.entry.param)
    ):
        raise LayerError(
            target,
            f"{type(module).__name__}.{place.entry.param} is computed by the class",
            "A parameter that is itself computed cannot take an update",
        )
    spec = place.target
    reads = not place.forward or (isinstance(spec, SiteSpec) and spec.init in FROM_WEIGHT)
    if reads and _is_quantised(place.weight):
        init = spec.init if isinstance(spec, SiteSpec) else ""
        reader = f"init {init}" if place.forward else "a weight update"
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
    mixin = mixin_for(target.kind) if forward else WeightUpdate  # type: ignore[union-attr]
    attached = swap(module, selection, mixin, () if place.forward else (entry.param,))
    for role, flat in entry.names.items():
        module._parameters[flat] = parameters[role]
        selection.extend_to(parameters[role].device)
    attached.add(entry, forward=place.forward)


def _detach(module: nn.Module, name: str | None) -> None:
    """Take an adapter, or all, off one module; the last one gives the class back."""
    attached = attached_to(module)
    if attached is None:
        return
    names = {e.adapter for e in attached.entries()} if name is None else {name}
    for entry in [e for n in names for e in attached.remove(n)]:
        for flat in entry.names.values():
            module._parameters.pop(flat, None)
    if any(True for _ in attached.entries()):
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
    survey = Survey(model)
    found = reach(survey.model, survey)
    check_names(found.names, [] if name is None else [name], "eject")
    for selection in found.selections:
        selection.check_settled("eject", others=True)
        if name is not None:
            refuse_merged(selection, f"ejecting {name!r}")
    roots = roots_of(survey)
    with all_or_nothing((m for _, m in survey.modules), (*found.selections, *roots.values())):
        for module in adapted_modules(survey).values():
            _detach(module, name)
        structure_changed()
        left = reach(survey.model, survey).names
        for path, root in reversed(roots.items()):
            _forget(survey if path == "" else Survey(survey.by_name[path]), root, left)
    return model


def _forget(survey: Survey, root: Root, left: frozenset[str]) -> None:
    """Drop what is gone from a root's record; without adapters the record goes too."""
    gone = set(root.configs) - left
    for name in gone:
        del root.configs[name]
    root.selection.forget(gone)
    active = tuple(item for item in root.selection.state.active if item[0] not in gone)
    if active != root.selection.state.active:
        root.selection.replace(State(active=active))
    allow_resizing((m for _, m in survey.modules), adapted_modules(survey).values())
    if root.configs:
        return
    root.selection.merged = None
    allow_loading(survey.model)
    del survey.model.__dict__[ROOT]
    inner = roots_of(survey)
    for key, parameter in survey.parameters():
        if key not in root.required_grad:
            continue
        for path, record in inner.items():
            if key.startswith(path + "."):
                record.required_grad.add(key.removeprefix(path + "."))
                break
        else:
            parameter.requires_grad_(True)


def _become_root(survey: Survey, selection: Selection) -> Root:
    """Make the model the root of all adapters inside: one record, one selection."""
    root: Root | None = survey.model.__dict__.get(ROOT)
    if root is None:
        root = survey.model.__dict__[ROOT] = Root(selection)
    active = dict(selection.state.active)
    for path, inner in roots_of(survey).items():
        if inner is root:
            continue
        active.update(inner.selection.state.active)
        root.configs.update(inner.configs)
        root.required_grad |= {f"{path}.{key}" for key in inner.required_grad}
        del survey.by_name[path].__dict__[ROOT]
    for module in adapted_modules(survey).values():
        attached = attached_to(module)
        assert attached is not None
        if attached.selection is not selection:
            attached.join(selection)
    if active != dict(selection.state.active):
        selection.replace(State(active=tuple(active.items())))
    return root


def _freeze(survey: Survey, root: Root) -> None:
    """Freeze every base parameter and remember which ones were not."""
    for path, module in survey.modules:
        for key, parameter in survey.own[id(module)].items():
            if parameter.requires_grad:
                root.required_grad.add(joined(path, key))
                parameter.requires_grad_(False)
