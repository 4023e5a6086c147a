"""The entries of one adapter on a model: all of them, and those that no forward has used."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from lora_inject.core.layers.attached import attached_to, check_class_kept
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import (
    Carried,
    check_names,
    entries,
    names_at,
    reach,
    records_of,
)
from lora_inject.errors import StateError


def whole_adapter(survey: Survey, name: str, asked: str) -> list[Carried]:
    """Return the entries of an adapter; raise if the model does not hold all of them."""
    check_names(reach(survey.model, survey).names | names_at(survey), [name], asked)
    records = records_of(survey, name)
    held = list(entries(survey, name))
    for path, module, _ in held:
        check_class_kept(module, f"{asked} {name!r} at {path!r}")
    if not records:  # a copy of one layer, which has no root
        return held
    carrying = {id(module): module for _, record in records for module in record.carrying[name]}
    there = {id(item.module) for item in held}
    for key, module in carrying.items():
        if key not in there:
            in_model = any(id(root) in survey.paths for root, _ in records)
            raise _lost(f"{asked} {name!r}", name, module, in_model=in_model)
    for item in held:
        if id(item.module) not in carrying:
            problem = (
                f"layer {item.path!r} has it, too, and inject did not put it there: it is a copy"
            )
            remedy = "Copy layers before inject, or call eject(layer) of the copy"
            raise StateError(f"{asked} {name!r}", problem, remedy)
    return held


def _lost(asked: str, name: str, module: nn.Module, *, in_model: bool) -> StateError:
    """Return the error of a layer that carries a part of an adapter and is not in the model."""
    attached = attached_to(module)
    entry = next(attached.entries(name), None) if attached is not None else None
    site = type(module).__name__
    if entry is not None:
        site = entry.param if entry.spec is None else entry.spec.name
    problem = f"the layer that carries its site {site!r} is not in the model"
    if in_model:
        return StateError(asked, f"{problem} any more", "Put the layer back, or eject the adapter")
    problem += ", which shares only some of its layers"
    return StateError(asked, problem, "Call it on the injected model")


def all_take_part(items: Collection[Carried]) -> bool:
    """Return whether a forward has used each entry, and all have a gradient or none has."""
    for item in items:
        attached = attached_to(item.module)
        if attached is not None and item.entry.mark not in attached.took_part:
            return False
    return len({*map(has_gradient, items)}) < 2


def has_gradient(item: Carried) -> bool:
    """Return whether a tensor of an entry has a gradient."""
    return any(t.grad is not None for t in item.entry.tensors(item.module).values())
