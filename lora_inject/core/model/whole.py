"""The entries of one adapter on a model: all of them, and whether each takes part."""

from __future__ import annotations

from collections.abc import Collection

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


def whole_adapter(survey: Survey, name: str, asked: str) -> list[Carried]:
    """Return the entries of an adapter; raise if the model does not hold all of them."""
    check_names(reach(survey.model, survey).names | names_at(survey), [name], asked)
    held = list(entries(survey, name))
    for path, module, _ in held:
        check_class_kept(module, f"{asked} {name!r} at {path!r}")
    records = records_of(survey, name)
    carrying = {id(module) for _, record in records for module in record.carrying[name]}
    if records and carrying != {id(item.module) for item in held}:  # a copy of a layer has no root
        from lora_inject.core.model.parted import why_not_whole

        raise why_not_whole(survey, name, held, f"{asked} {name!r}")
    return held


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
