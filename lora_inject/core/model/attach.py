"""Put an adapter onto a model; everything is checked before the first change.

`places` finds the module of each tensor and checks that it can take the tensor. `attach` changes
classes, and undoes all changes if a step fails. Injecting and loading both use these two functions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_inject.core.functional.weight import reads_as_sum
from lora_inject.core.layers.adapted import WeightUpdate
from lora_inject.core.layers.attached import Attached, Entry, attached_to, attribute, refuse_mixed
from lora_inject.core.layers.class_swap import check_swappable, swap
from lora_inject.core.layers.kinds import mixin_for
from lora_inject.core.layers.packed_weights import begin_training, weight_kind
from lora_inject.core.layers.plain_tensors import is_quantized
from lora_inject.core.layers.selected import Mix
from lora_inject.core.layers.selection import Selection
from lora_inject.core.layers.snapshot import all_or_nothing
from lora_inject.core.layers.survey import Survey
from lora_inject.core.layers.valueless import moved
from lora_inject.core.model.carried import (
    ROOT,
    ROOT_MODULES,
    Carried,
    Root,
    adapted_modules,
    check_new_name,
    reach,
    roots_of,
    structure_changed,
)
from lora_inject.core.model.guards import after, before
from lora_inject.core.model.train import forget_gradients, trainable_tensors
from lora_inject.core.spec.names import Below
from lora_inject.core.spec.rooms import room
from lora_inject.core.spec.sites import FROM_WEIGHT, SiteSpec
from lora_inject.errors import LayerError, StateError


def survey_for(model: nn.Module, name: str, *, loads: bool = False) -> Survey:
    """Return a survey of a model that can take a new adapter of that name now."""
    survey = Survey(model)
    before("attach", survey, f"adapter {name!r}", loads=loads)
    check_new_name(reach(survey.model, survey), name)
    return survey


def places(
    survey: Survey,
    name: str,
    sites: Iterable[SiteSpec],
    copies: Mapping[str, tuple[int, ...] | None],
) -> list[Carried]:
    """Find the module of each site and of each name of a copied tensor; check that it can take it.

    Sites and copies have the model's own names; copies come with their rows, None for all. Nothing
    is changed.
    """
    for holder in survey.holders:
        if is_lazy(holder.tensor):
            lazy = "it is lazy and not initialized"
            raise LayerError(f"adapter {name!r}, {holder.name!r}", lazy, "Run the model once first")
    carried = []
    flat_names = cache(lambda roles, read: {role: attribute(role, name, read) for role in roles})
    for spec in sites:
        _, module, param = survey.at(spec.weight)
        starts = ("A0", "B0") * (spec.init in FROM_WEIGHT)
        roles = (*(role for role in spec.shapes if role != "b"), *starts)
        names = flat_names(roles, None if spec.update == "forward" else param)  # shared by sites
        path = survey.paths[id(module)]
        carried.append(Carried(path, module, Entry(name, spec, param, names)))
        if spec.lora_bias:
            b = {"b": attribute("b", name, "bias")}
            entry = Entry(name, None, "bias", b, spec.shapes["b"], None, spec.scale)
            carried.append(Carried(path, module, entry))
    for copy, rows in copies.items():
        _, module, param = holder = survey.at(copy)
        whole = holder.tensor.shape
        shape = tuple(whole) if rows is None else (len(rows), *whole[1:])
        entry = Entry(name, None, param, {"T": attribute("T", name, param)}, shape, rows)
        carried.append(Carried(survey.paths[id(module)], module, entry))
    taken: set[tuple[int, str]] = set()
    for place in carried:
        target = f"{'site' if place.entry.spec else 'trained tensor'} {place.name!r}"
        for reason in chain(_why_not_here(place, taken), _why_not_values(place)):
            raise LayerError(target, *reason)
        check_swappable(place.module, target)
        taken.add((id(place.module), place.entry.param))
    return carried


def _why_not_here(place: Carried, taken: set[tuple[int, str]]) -> Iterator[tuple[str, str]]:
    """Yield why a module cannot take an entry, and what to do."""
    module, entry, cls = place.module, place.entry, type(place.module)
    if (id(module), entry.param) in taken:
        problem = f"its {entry.param!r} is adapted and trained, or gets a bias twice"
        yield problem, "Leave one of train, bias and lora_bias out"
    if entry.scale is not None and module._parameters.get("bias") is None:
        problem = (
            "lora_bias is added to the layer's bias, which is None: no merge could hold the sum"
        )
        yield problem, "Leave lora_bias out there, or give the layer a bias of zeros"
    for flat in entry.names.values():
        if hasattr(module, flat):
            yield f"the module has an attribute {flat!r}", "Choose another adapter name"
    if not entry.on_output and attached_to(module) is None and hasattr(cls, entry.param):
        problem = f"{cls.__name__}.{entry.param} is computed by the class"
        yield problem, "A parameter that is itself computed cannot take an update"


def refuse_statistics(survey: Survey, modules: Collection[str], asked: str) -> None:
    """Raise if one of the modules that are to train in full has a layer with statistics inside."""
    below = Below(modules)
    for name, module in survey.by_name.items() if modules else ():
        for reason in _why_not_in_full(module) if name in below else ():
            raise LayerError(f"{asked}, {name!r}", *reason)


def _why_not_in_full(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield why a layer that moves statistics, which are buffers, cannot train in full."""
    if isinstance(getattr(module, "running_mean", None), Tensor):
        problem = (
            f"its {type(module).__name__} moves running_mean and running_var as well while it "
        )
        problem += (
            "trains: those are the base's buffers, which an adapter neither holds nor restores"
        )
        remedy = "Leave it out, or give the layer track_running_stats=False and no running_mean"
        yield problem, remedy


def _why_not_values(place: Carried) -> Iterator[tuple[str, str]]:
    """Yield why an entry cannot read or copy the values of its tensor, and what to do."""
    module, spec, weight = place.module, place.entry.spec, place.weight
    packed = f"quantized ({type(weight).__name__})" if is_quantized(weight) else ""
    if spec is None and packed:
        remedy = "Adapt the layer with a rule (targets) instead, or load the base unquantized"
        yield f"it is {packed}: no copy of it can train", remedy
    if spec is None:
        yield from _why_not_in_full(module)
        return
    gained, derived = place.entry.variant.gained, spec.init in FROM_WEIGHT
    if gained and spec.why_no_gain:
        problem = f"variant {spec.variant} on {spec.why_no_gain}"
        yield problem, "Train it with variant: lora"
    fits = place.entry.on_output or reads_as_sum(weight)
    if packed and not place.entry.on_output and fits and spec.compute == "float32":
        yield "compute: float32 would unpack all experts at once", "Use compute: base"
    hidden = None
    if packed and gained and fits:
        hidden = weight_kind(module, weight).why_not("norms", module, weight)
    if packed and (hidden or derived or not fits):
        reader = f"init {spec.init}" if derived else f"variant {spec.variant}"
        reader = reader if fits else "a weight update"
        wants = ["the layer rather than its weight"] * (not fits)
        wants += ["variant: lora"] * bool(hidden) + ["an init that does not start from W"] * derived
        packed += f": {hidden.found}" if hidden else ""
        yield f"{reader} reads its values, and they are {packed}", f"Use {' and '.join(wants)}"


def _trainable(tensor: Tensor) -> Tensor:
    """Return a tensor that can train: one that was made in inference mode cannot."""
    return tensor.clone() if tensor.is_inference() else tensor


def attach(
    survey: Survey,
    name: str,
    carried: Sequence[Carried],
    tensors: Callable[[Carried], Mapping[str, Tensor]],
    tied: Callable[[Carried], Hashable],
    config: Mapping[str, Any] | None,
    *,
    activate: bool = True,
    train: bool = True,
    probe: Callable[[], Any] | None = None,
) -> None:
    """Put a new adapter onto a model, all or nothing, at the places that `places` returned.

    `tensors` gives those of a place by role; trained copies for which `tied` is equal are one
    Parameter. With `train` the adapter becomes the only one that trains and, if it is to be active,
    the only active one. `probe` runs the model; sites that it does not reach are refused.
    """
    made: dict[Hashable, dict[str, nn.Parameter]] = {}
    keys = [tied(place) if place.entry.spec is None else id(place) for place in carried]
    with torch.inference_mode(False):  # tensors that are made in it could not train
        for key, place in zip(keys, carried, strict=True):
            made[key] = made.get(key) or {
                role: nn.Parameter(_trainable(tensor), train and place.entry.trains(role))
                for role, tensor in tensors(place).items()
            }
    before, records = reach(survey.model, survey), roots_of(survey).values()
    _check_joinable(survey, name, before.selections, train and activate)
    selection = next(iter(before.selections), None) or Selection()
    if not activate:
        _check_mixable(name, carried, selection.setting.names)
    modules = [module for _, module in survey.modules]
    # Only tensors of these records: checking every tensor of every adapter would be quadratic.
    named = {each for record in records for each in record.trainable} if records else (None,)
    flags = [holder.tensor for holder in survey.holders]
    flags += [p for each in named for *_, p in trainable_tensors(survey, each)]
    values = (selection, *before.selections, *records)
    with all_or_nothing(modules, values, flags) as trained:
        root = _become_root(survey, selection)
        root.configs[name] = config
        root.carrying[name] = list({id(place.module): place.module for place in carried}.values())
        _freeze(survey, root)
        for parameter in trained if train else ():  # the new ones are trainable already
            parameter.requires_grad_(False)
        if train:
            root.trainable = {name}
        for key, place in zip(keys, carried, strict=True):
            attached = _put(place, made[key], selection)
            attached.time_major = f"{place.path}.".startswith(survey.time_major)
        structure_changed()
        after("attach", modules, root.carrying[name])
        if train:
            begin_training(modules)
        if activate:
            others = {} if train else selection.setting.names  # of other parts of the model
            selection.replace(Mix({**others, name: 1.0}))
        if probe is not None:
            room("reached").refuse_unreached(survey.model, probe)
    forget_gradients(holder.tensor for holder in survey.holders)
    forget_gradients(trained if train else ())


def _put(place: Carried, parameters: Mapping[str, nn.Parameter], selection: Selection) -> Attached:
    entry, module, spec = place.entry, place.module, place.entry.spec
    mixin = mixin_for(spec.kind) if entry.on_output and spec is not None else WeightUpdate
    attached = swap(module, selection, mixin, () if entry.on_output else (entry.param,))
    for role, flat in entry.names.items():
        module._parameters[flat] = parameters[role]
        selection.extend_to(parameters[role].device)
    attached.add(entry)
    if any(parameter.is_meta for parameter in parameters.values()):
        moved(module, emptied=False)
    return attached


def _check_joinable(
    survey: Survey, name: str, selections: Sequence[Selection], alone: bool
) -> None:
    """Check that parts with separate selections compute the same with a common one.

    An adapter that is `alone` active replaces all others, so no selection is lost.
    """
    if len(selections) < 2:
        return
    for selection in selections:
        selection.check_settled(f"adding adapter {name!r}", others=True)
    joint = dict(item for selection in selections for item in selection.setting.names.items())
    for path, _, attached in adapted_modules(survey) if not alone else ():
        own = attached.selection.setting.names
        for entry in attached.entries():
            if own.get(entry.adapter) != joint.get(entry.adapter):
                raise StateError(
                    f"adding adapter {name!r}",
                    f"parts of the model were injected apart, and {entry.adapter!r} is active in "
                    f"one with another weight than in {path!r}",
                    "Call activate(model, ...) first, which sets the selection of all parts",
                )


def _check_mixable(name: str, carried: Iterable[Carried], active: Mapping[str, float]) -> None:
    """Check a new adapter that takes part at once, as the mix has named one of another part."""
    for place in carried if name in active else ():
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
    active = dict(selection.setting.names)
    for path, inner in roots_of(survey).items():
        if inner is root:
            continue
        active.update(inner.selection.setting.names)
        root.configs |= inner.configs | root.configs
        root.files |= inner.files | root.files
        root.slots |= inner.slots
        for name, modules in inner.carrying.items():
            root.carrying[name] = [*root.carrying.get(name, ()), *modules]
        root.required_grad |= {f"{path}.{key}": at for key, at in inner.required_grad.items()}
        root.trainable |= inner.trainable
        del survey.by_name[path].__dict__[ROOT]
    for _, _, attached in adapted_modules(survey):
        if attached.selection is not selection:
            attached.join(selection)
    if active != selection.setting.names:
        selection.replace(Mix(active))
    return root


def _freeze(survey: Survey, root: Root) -> None:
    """Freeze every base parameter and remember which ones were not, by all names of a tied one."""
    unfrozen = [holder for holder in survey.holders if holder.tensor.requires_grad]
    root.required_grad |= {holder.name: holder for holder in unfrozen}
    for holder in unfrozen:
        holder.tensor.requires_grad_(False)
