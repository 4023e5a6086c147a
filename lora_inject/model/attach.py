"""Putting an adapter, as a value, onto a model: everything is checked before the first change.

`places` finds the module of each tensor and checks that it can take it; `attach` changes classes
and takes back what was done where a step fails. Injecting and loading both end here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.adapter.state import AdapterState
from lora_inject.errors import LayerError
from lora_inject.layers.adapted import WeightUpdate, is_quantized
from lora_inject.layers.attached import TRAINABLE_ROLES, Entry, attached_to, attribute
from lora_inject.layers.class_swap import check_swappable, swap
from lora_inject.layers.initial import FROM_WEIGHT
from lora_inject.layers.kinds import mixin_for
from lora_inject.layers.resizing import refuse_resizing
from lora_inject.layers.selection import Selection, State
from lora_inject.layers.snapshot import all_or_nothing
from lora_inject.layers.survey import Survey
from lora_inject.model.carried import (
    ROOT,
    ROOT_MODULES,
    Root,
    adapted_modules,
    check_new_name,
    reach,
    roots_of,
    structure_changed,
)
from lora_inject.model.reached import refuse_unreached
from lora_inject.model.save_pretrained import save_adapters_instead
from lora_inject.model.trainable import state_adapters
from lora_inject.spec.names import joined
from lora_inject.spec.sites import SiteSpec


class Place(NamedTuple):
    """Where one site or one full trained copy of a new adapter goes.

    Attributes:
        name: Name of the site, or of the tensor that is copied.
        module: The module that gets it.
        entry: What its `Attached` will say of it.
        forward: Whether it is a forward update.
    """

    name: str
    module: nn.Module
    entry: Entry
    forward: bool

    @property
    def weight(self) -> Tensor:
        """The frozen tensor."""
        found = self.module._parameters[self.entry.param]
        assert found is not None
        return found


def places(
    survey: Survey, name: str, sites: Iterable[SiteSpec], copies: Iterable[str]
) -> list[Place]:
    """Find the module of each site and copy, and check that it can take it; change nothing.

    Args:
        survey: Of the root.
        name: Name of the new adapter.
        sites: Its sites, in the model's own names.
        copies: Every name of a base tensor that reads as a full trained copy.

    Raises:
        StateError: The name is in use, or the model is merged.
        LayerError: A module cannot change its class, or an attribute is in
            the way.
    """
    check_new_name(reach(survey.model, survey), name)
    modules = survey.by_name
    found = []
    flat: dict[tuple[str | None, bool], dict[str, str]] = {}  # shared by all sites alike
    for spec in sites:
        forward, derived = spec.update == "forward", spec.init in FROM_WEIGHT
        owner, _, param = spec.weight.rpartition(".")
        read = None if forward else param
        names = flat.get((read, derived))
        if names is None:
            roles = ("A", "B", "A0", "B0") if derived else ("A", "B")
            names = flat[read, derived] = {role: attribute(role, name, read) for role in roles}
        found.append(Place(spec.name, modules[owner], Entry(name, spec, param, names), forward))
    for copy in copies:
        owner, _, param = copy.rpartition(".")
        weight = modules[owner]._parameters[param]
        assert weight is not None
        entry = Entry(name, None, param, {"T": attribute("T", name, param)}, tuple(weight.shape))
        found.append(Place(copy, modules[owner], entry, forward=False))
    for place in found:
        _check(place)
    return found


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
    init = spec.init if spec is not None else ""
    if (not place.forward or init in FROM_WEIGHT) and is_quantized(place.weight):
        reader = f"init {init}" if place.forward else "a weight update"
        raise LayerError(
            target,
            f"{reader} reads its values, and they are quantized ({type(place.weight).__name__})",
            "Name the layer rather than its weight, with an init that does not start from W",
        )
    if spec is None:
        _refuse_statistics(place)
    check_swappable(module, target)


def _refuse_statistics(place: Place) -> None:
    """Refuse a full copy in a layer whose training also moves buffers, which stay the base's."""
    module = place.module
    if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
        raise LayerError(
            f"trained tensor {place.name!r}",
            f"its {type(module).__name__} moves running_mean and running_var as well while it "
            "trains: those are the base's buffers, which an adapter neither holds nor restores",
            "Leave it out, or give the layer track_running_stats=False and no running_mean",
        )


def attach(
    survey: Survey,
    name: str,
    found: Iterable[Place],
    state: AdapterState,
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
        state: The adapter. Its tensors become the Parameters; one that stands under several names
            of `trained` becomes one Parameter.
        activate: Whether it becomes the only active adapter.
        train: Whether it becomes the only trainable adapter; else it is frozen.
        probe: Runs the model; sites that it does not reach are refused.

    Raises:
        LayerError: A site is not reached by `probe`.
    """
    with torch.inference_mode(False):  # Parameters that are made in it could not train
        made = _parameters(found, state, train)
    selections = reach(survey.model, survey).selections
    selection = next(iter(selections), None) or Selection()
    modules = [module for _, module in survey.modules]
    values = (selection, *selections, *roots_of(survey).values())
    with all_or_nothing(modules, values) as trained:
        root = _become_root(survey, selection)
        root.configs[name] = state.config
        root.carrying[name] = list({id(place.module): place.module for place, _ in made}.values())
        _freeze(survey, root)
        for parameter in trained if train else ():  # the new ones are trainable already
            parameter.requires_grad_(False)
        for place, parameters in made:
            _attach(place, parameters, selection)
        refuse_resizing(modules, adapted_modules(survey).values())
        structure_changed()
        save_adapters_instead(modules)
        state_adapters(modules)
        if activate:
            selection.replace(State(active=((name, 1.0),)))
        if probe is not None:
            refuse_unreached(survey.model, probe)


def _parameters(
    found: Iterable[Place], state: AdapterState, train: bool
) -> list[tuple[Place, dict[str, nn.Parameter]]]:
    """Make the Parameters of each place, by role; a tensor under several names becomes one."""
    copies: dict[int, nn.Parameter] = {}
    made = []
    for place in found:
        if place.entry.spec is None:
            tensor = state.trained[place.name]
            copy = copies.setdefault(id(tensor), nn.Parameter(tensor, train))
            made.append((place, {"T": copy}))
            continue
        tensors = state.sites[place.name].tensors
        made.append((place, {role: _parameter(t, role, train) for role, t in tensors.items()}))
    return made


def _parameter(tensor: Tensor, role: str, train: bool) -> nn.Parameter:
    return nn.Parameter(tensor, train and role in TRAINABLE_ROLES)


def _attach(place: Place, parameters: Mapping[str, nn.Parameter], selection: Selection) -> None:
    entry, module = place.entry, place.module
    forward = place.forward and entry.spec is not None
    mixin = mixin_for(entry.spec.kind) if forward else WeightUpdate  # type: ignore[union-attr]
    attached = swap(module, selection, mixin, () if place.forward else (entry.param,))
    for role, flat in entry.names.items():
        module._parameters[flat] = parameters[role]
        selection.extend_to(parameters[role].device)
    attached.add(entry, forward=place.forward)


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
    """Freeze every base parameter and remember which ones were not, by all names of a tied one."""
    unfrozen = [
        (joined(path, key), parameter)
        for path, module in survey.modules
        for key, parameter in survey.own[id(module)].items()
        if parameter.requires_grad
    ]
    root.required_grad.update(name for name, _ in unfrozen)
    for _, parameter in unfrozen:
        parameter.requires_grad_(False)
