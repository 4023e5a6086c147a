"""A further adapter, where this model or another of the process has some: what it may share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import nn

from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.gains import check_mixed
from lora_inject.core.layers.selection import Selection
from lora_inject.core.layers.survey import Carried, Holder, Survey
from lora_inject.core.roots.carried import (
    Root,
    check_unmerged,
    known_roots,
    reach,
    records_of,
    root_at,
    roots_of,
)
from lora_inject.errors import StateError


def _still(holds: Callable[[], bool]) -> bool:
    """Return whether something holds of the roots that there are, without those that wait to go.

    A model that was deleted and lies in a cycle of references waits for the collector.
    """
    if not holds():
        return False
    gc.collect()
    return holds()


def shared_selection(survey: Survey, wanted: Sequence[Carried], asked: str) -> Selection:
    """Return what the layers of a model share, or will if they have no adapter yet.

    1. A root has its own; another model takes that of the adapted layers inside.
    2. Where a layer that is wanted stands in another root as well, both share that root's.
    3. Else it is a new one: what two models share and neither adapts joins nothing.

    Raises:
        StateError: Two of these differ.
    """
    record = root_at(survey)
    adapted = reach(survey.model, survey).selections
    own = [*adapted][:1] if record is None else [record.selection]
    shared = {*own, *_selections_around(survey, wanted)}
    if len(shared) > 1:
        gc.collect()  # a model that nobody holds any more may wait for it
        shared = {*own, *_selections_around(survey, wanted)}
    if len(shared) > 1:
        problem = "a layer that it would adapt is also in a model that was injected apart"
        remedy = "Inject that layer first, in either model; or give each model a copy of it"
        raise StateError(asked, problem, remedy)
    return shared.pop() if shared else Selection()


def _selections_around(survey: Survey, wanted: Sequence[Carried]) -> list[Selection]:
    """Return those of the other roots that have a module which is wanted here."""
    others = [(root, record) for root, record in known_roots() if root is not survey.model]
    modules = {id(place.module) for place in wanted} if others else set[int]()
    return [
        record.selection
        for root, record in others
        if not modules.isdisjoint(map(id, root.modules()))
    ]


def check_not_nested(survey: Survey, asked: str) -> None:
    """Refuse to inject into a module inside or around a root, or into layers of several roots."""
    inside = [path for path in roots_of(survey) if path]
    if inside:
        problem = f"a part of the model, {inside[0]!r}, was injected by itself"
        remedy = "Inject into that part again, or eject it and inject into the whole model"
        raise StateError(asked, problem, remedy)
    if root_at(survey) is None and _still(lambda: _is_inside_a_root(survey)):
        problem = "the module is a part of a model that was injected"
        remedy = (
            "Inject into that model, with patterns that begin with the name of the part; if it is "
            "gone, eject this part first"
        )
        raise StateError(asked, problem, remedy)
    if len(reach(survey.model, survey).selections) > 1:
        problem = "it has layers of models that were injected apart"
        raise StateError(asked, problem, "Eject those first")


def _is_inside_a_root(survey: Survey) -> bool:
    """Return whether a module is a part of a root, also of a copy that nobody has asked yet."""
    if any(survey.model is part for root, _ in known_roots() for part in root.modules()):
        return True
    known = {id(record.selection) for _, record in known_roots()}
    return any(id(each) not in known for each in reach(survey.model, survey).selections)


def check_free_name(survey: Survey, name: str) -> None:
    """Check that an adapter of that name can be added to a model now."""
    asked = f"adapter {name!r}"
    there = reach(survey.model, survey)
    if name in there.names:
        has_it = "the model has one of that name"
        raise StateError(asked, has_it, "Eject it, or choose another name")
    if _still(lambda: bool(records_of(survey, name))):
        has_it = "a layer that was replaced, or a model that shares layers, has one of that name"
        raise StateError(asked, has_it, "Eject it, or choose another name")
    for selection in there.selections:
        selection.check_settled(f"adding adapter {name!r}")
    check_unmerged(f"adding adapter {name!r}", *there.selections)


def check_mixable(wanted: Iterable[Carried], active: Mapping[str, float]) -> None:
    """Check an adapter that takes part at once, as the mix has named one of another part."""
    for place in wanted:
        attached = attached_to(place.module)
        beside = attached.entries() if attached is not None else ()
        there = [e for e in beside if e.param == place.entry.param and e.adapter in active]
        check_mixed([(entry, active[entry.adapter]) for entry in (place.entry, *there)])


def training_in(records: Iterable[Root]) -> Iterator[nn.Parameter]:
    """Yield the tensors of the adapters that records say train.

    To ask every tensor of every adapter would be quadratic in a model that collects adapters.
    """
    for record in records:
        for name in record.trainable:
            yield from (p for module in record.carrying[name] for p in _held(module, name))


def _held(module: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """Yield the tensors of an adapter on a module that may train."""
    attached = attached_to(module)
    for entry in () if attached is None else attached.entries(name):
        for role, flat in entry.names.items():
            parameter = module._parameters[flat]
            if entry.trains(role) and parameter is not None:
                yield parameter


def held_in_common(record: Root) -> dict[int, tuple[Root, Holder]]:
    """Return the base parameters of roots that share layers with one, by id, with their root."""
    others = [(m, other) for m, other in known_roots() if other.selection is record.selection]
    return {
        id(holder.tensor): (other, holder)
        for model, other in others
        for holder in Survey(model).holders
    }
