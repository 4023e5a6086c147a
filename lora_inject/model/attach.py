"""Putting an adapter onto a model: everything is checked before the first change.

`places` finds the module of each tensor and checks that it can take it; `attach` changes classes
and takes back what was done where a step fails. Injecting and loading both begin and end here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lora_inject.errors import LayerError, StateError
from lora_inject.layers.adapted import WeightUpdate
from lora_inject.layers.attached import Entry, attached_to, attribute, refuse_mixed
from lora_inject.layers.class_swap import check_swappable, swap
from lora_inject.layers.kinds import mixin_for
from lora_inject.layers.reading import is_quantized
from lora_inject.layers.selection import Selection, State
from lora_inject.layers.snapshot import all_or_nothing
from lora_inject.layers.survey import Survey, base_tensor
from lora_inject.model.carried import (
    ROOT,
    ROOT_MODULES,
    Root,
    adapted_modules,
    check_new_name,
    keep_with,
    reach,
    roots_of,
    structure_changed,
)
from lora_inject.model.reached import refuse_unreached
from lora_inject.model.sharding import refuse_sharded
from lora_inject.model.stand_ins import stand_in
from lora_inject.model.train import trainable_tensors
from lora_inject.spec.names import joined
from lora_inject.spec.roles import FROM_WEIGHT
from lora_inject.spec.sites import SiteSpec


class Place(NamedTuple):
    """Where one site or one full trained copy of a new adapter, of that name, goes."""

    name: str
    module: nn.Module
    entry: Entry
    forward: bool

    @property
    def weight(self) -> Tensor:
        """The frozen tensor."""
        return base_tensor(self.module, self.entry.param)


def survey_for(model: nn.Module, name: str) -> Survey:
    """Return a survey of a model that can take a new adapter of that name now."""
    survey = Survey(model)
    refuse_sharded(survey, f"adapter {name!r}")
    check_new_name(reach(survey.model, survey), name)
    return survey


def places(
    survey: Survey,
    name: str,
    sites: Iterable[SiteSpec],
    copies: Mapping[str, tuple[int, ...] | None],
) -> list[Place]:
    """Find the module of each site and of each name of a copied tensor; check that it can take it.

    Sites and copies have the model's own names; copies come with their rows, None for all. Nothing
    is changed.
    """
    modules = survey.by_name
    found = []
    flat: dict[tuple[str | None, bool, str], dict[str, str]] = {}  # shared by all sites alike
    for spec in sites:
        forward, derived = spec.update == "forward", spec.init in FROM_WEIGHT
        owner, _, param = spec.weight.rpartition(".")
        read = None if forward else param
        names = flat.get((read, derived, spec.variant))
        if names is None:
            roles = (*(r for r in spec.shapes if r != "b"), *(("A0", "B0") if derived else ()))
            names = {role: attribute(role, name, read) for role in roles}
            flat[read, derived, spec.variant] = names
        found.append(Place(spec.name, modules[owner], Entry(name, spec, param, names), forward))
        if spec.lora_bias:
            found.append(_bias_of(spec, name, modules[owner]))
    for copy, rows in copies.items():
        owner, _, param = copy.rpartition(".")
        weight = modules[owner]._parameters[param]
        assert weight is not None
        shape = tuple(weight.shape) if rows is None else (len(rows), *weight.shape[1:])
        entry = Entry(name, None, param, {"T": attribute("T", name, param)}, shape, rows)
        found.append(Place(copy, modules[owner], entry, forward=False))
    _check_once(found)
    for place in found:
        _check(place)
    return found


def _bias_of(spec: SiteSpec, name: str, module: nn.Module) -> Place:
    """Return the place of a bias of B, which is added to the layer's own bias."""
    if module._parameters.get("bias") is None:
        raise LayerError(
            f"site {spec.name!r}",
            "lora_bias is added to the layer's bias, which is None: no merge could hold the sum",
            "Leave lora_bias out there, or give the layer a bias of zeros",
        )
    names = {"b": attribute("b", name, "bias")}
    entry = Entry(name, None, "bias", names, spec.shapes["b"], None, spec.scale)
    return Place(spec.name, module, entry, forward=False)


def _check_once(found: Iterable[Place]) -> None:
    """Refuse two entries of one adapter on one tensor."""
    seen: set[tuple[int, str]] = set()
    for place in found:
        key = id(place.module), place.entry.param
        if key in seen:
            raise LayerError(
                f"site {place.name!r}",
                f"its {place.entry.param!r} is adapted and trained, or gets a bias twice",
                "Leave one of train, bias and lora_bias out",
            )
        seen.add(key)


def _check(place: Place) -> None:
    target = f"site {place.name!r}"
    module, spec = place.module, place.entry.spec
    for flat in place.entry.names.values():
        own = (module.__dict__, module._modules, module._parameters, module._buffers)
        if any(flat in table for table in own) or hasattr(type(module), flat):
            raise LayerError(
                target, f"the module has an attribute {flat!r}", "Choose another adapter name"
            )
    cls = type(module)
    if not place.forward and attached_to(module) is None and hasattr(cls, place.entry.param):
        raise LayerError(
            target,
            f"{cls.__name__}.{place.entry.param} is computed by the class",
            "A parameter that is itself computed cannot take an update",
        )
    init, gained = spec.init if spec is not None else "", place.entry.variant.gained
    if gained and spec is not None and spec.why_no_gain:
        found = f"variant {spec.variant} on {spec.why_no_gain}"
        raise LayerError(target, found, "Train it with variant: lora")
    if (not place.forward or gained or init in FROM_WEIGHT) and is_quantized(place.weight):
        derived = f"init {init}" if init in FROM_WEIGHT else f"variant {spec and spec.variant}"
        reader = derived if place.forward else "a weight update"
        if spec is None:
            raise LayerError(
                f"trained tensor {place.name!r}",
                f"it is quantized ({type(place.weight).__name__}): no copy of it can train",
                "Adapt the layer with a rule (targets) instead, or load the base unquantized",
            )
        raise LayerError(
            target,
            f"{reader} reads its values, and they are quantized ({type(place.weight).__name__})",
            "Target the layer rather than its weight, with variant: lora and an init that does not "
            "start from W",
        )
    if spec is None and isinstance(module, _NormBase) and module.running_mean is not None:
        raise LayerError(
            f"trained tensor {place.name!r}",
            f"its {cls.__name__} moves running_mean and running_var as well while it trains: those "
            "are the base's buffers, which an adapter neither holds nor restores",
            "Leave it out, or give the layer track_running_stats=False and no running_mean",
        )
    check_swappable(module, target)


def attach(
    survey: Survey,
    name: str,
    found: Iterable[Place],
    tensors: Callable[[Place], Mapping[str, Tensor]],
    tied: Callable[[Place], Hashable],
    config: Mapping[str, Any] | None,
    *,
    activate: bool = True,
    train: bool = True,
    probe: Callable[[], Any] | None = None,
) -> None:
    """Put an adapter onto a model, all of it or nothing.

    Args:
        survey: Of the root.
        name: Name of the new adapter.
        found: What `places` returned.
        tensors: Gives the tensors of a place by role, which become the Parameters.
        tied: Gives what is equal for places whose trained copies are to be one Parameter.
        config: What it was made from, where that is known.
        activate: Whether it becomes the only active adapter.
        train: Whether it becomes the only trainable adapter; else it is frozen.
        probe: Runs the model; sites that it does not reach are refused.
    """
    made: list[tuple[Place, dict[str, nn.Parameter]]] = []
    copies: dict[Hashable, dict[str, nn.Parameter]] = {}
    with torch.inference_mode(False):  # tensors that are made in it could not train
        for place in found:
            copy = tied(place) if place.entry.spec is None else None
            parameters = copies.get(copy) or {
                role: nn.Parameter(tensor, train and place.entry.trains(role))
                for role, tensor in tensors(place).items()
            }
            if copy is not None:
                copies[copy] = parameters
            made.append((place, parameters))
    before, records = reach(survey.model, survey), roots_of(survey).values()
    _check_joinable(survey, name, before.selections, activate)
    selection = next(iter(before.selections), None) or Selection()
    if not activate:
        _check_mixable(name, found, dict(selection.state.active))
    modules = [module for _, module in survey.modules]
    # Only what these records name: looking at every tensor of every adapter would be quadratic.
    named = {each for record in records for each in record.trainable} if records else (None,)
    flags = [p for _, p in survey.parameters()]
    flags += [p for each in named for *_, p in trainable_tensors(survey, each)]
    values = (selection, *before.selections, *records)
    with all_or_nothing(modules, values, flags, grows=True) as trained:
        root = _become_root(survey, selection)
        root.configs[name] = config
        root.carrying[name] = list({id(place.module): place.module for place, _ in made}.values())
        _freeze(survey, root)
        for parameter in trained if train else ():  # the new ones are trainable already
            parameter.requires_grad_(False)
        if train:
            root.trainable = {name}
        for place, parameters in made:
            _attach(place, parameters, selection)
        structure_changed()
        if before.selections in ((), (selection,)):
            reading, paths = [p for p, _ in made if not p.forward], survey.paths
            reads = [(paths[id(p.module)], p.module, p.entry) for p in reading]
            gained = any(place.entry.variant.gained for place, _ in made)
            keep_with(root, before, name, reads, gained=gained)
        stand_in(modules, root.carrying[name])
        if activate:
            selection.replace(State(active=((name, 1.0),)))
        if probe is not None:
            refuse_unreached(survey.model, probe)


def _attach(place: Place, parameters: Mapping[str, nn.Parameter], selection: Selection) -> None:
    entry, module = place.entry, place.module
    forward = place.forward and entry.spec is not None
    mixin = mixin_for(entry.spec.kind) if forward else WeightUpdate  # type: ignore[union-attr]
    attached = swap(module, selection, mixin, () if place.forward else (entry.param,))
    for role, flat in entry.names.items():
        module._parameters[flat] = parameters[role]
        selection.extend_to(parameters[role].device)
    attached.add(entry, forward=place.forward)


def _check_joinable(
    survey: Survey, name: str, selections: Sequence[Selection], activate: bool
) -> None:
    """Check that parts with separate selections compute the same with a common one.

    An adapter that is added as active replaces all others, so no selection is lost.
    """
    if len(selections) < 2:
        return
    for selection in selections:
        selection.check_settled(f"adding adapter {name!r}", others=True)
    joint = dict(item for selection in selections for item in selection.state.active)
    for path, module in adapted_modules(survey).items() if not activate else ():
        attached = attached_to(module)
        assert attached is not None
        own = dict(attached.selection.state.active)
        for entry in attached.entries():
            if own.get(entry.adapter) != joint.get(entry.adapter):
                raise StateError(
                    f"adding adapter {name!r}",
                    f"parts of the model were injected apart, and {entry.adapter!r} is active in "
                    f"one with another weight than in {path!r}",
                    "Call activate(model, ...) first, which sets the selection of all parts",
                )


def _check_mixable(name: str, found: Iterable[Place], active: Mapping[str, float]) -> None:
    """Check a new adapter that takes part at once, as the mix has named one of another part."""
    for place in found if name in active else ():
        attached = attached_to(place.module)
        beside = attached.entries() if attached is not None else ()
        there = [e for e in beside if e.param == place.entry.param and e.adapter in active]
        refuse_mixed([(entry, active[entry.adapter]) for entry in (place.entry, *there)])


def _become_root(survey: Survey, selection: Selection) -> Root:
    """Make the model the root of all adapters inside: one record, one selection."""
    root: Root | None = survey.model.__dict__.get(ROOT)
    if root is None:
        root = survey.model.__dict__[ROOT] = Root(selection)
        ROOT_MODULES.add(survey.model)
    active = dict(selection.state.active)
    for path, inner in roots_of(survey).items():
        if inner is root:
            continue
        active.update(inner.selection.state.active)
        for name, config in inner.configs.items():
            root.configs.setdefault(name, config)
        for name, modules in inner.carrying.items():
            root.carrying[name] = [*root.carrying.get(name, ()), *modules]
        root.required_grad |= {f"{path}.{key}": at for key, at in inner.required_grad.items()}
        root.trainable |= inner.trainable
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
    """Freeze every base parameter and remember which ones were not, by all names of a tied one."""
    unfrozen = []
    for path, module in survey.modules:
        for key, parameter in survey.own[id(module)].items():
            if parameter.requires_grad:
                root.required_grad[joined(path, key)] = module, key
                unfrozen.append(parameter)
    for parameter in unfrozen:
        parameter.requires_grad_(False)
