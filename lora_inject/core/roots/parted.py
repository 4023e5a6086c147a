"""Why a model does not hold all of an adapter, or holds more than was put on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.survey import Survey
from lora_inject.errors import StateError


def why_not_whole(
    survey: Survey,
    name: str,
    held: Iterable[Any],
    records: Iterable[tuple[nn.Module, Any]],
    asked: str,
) -> StateError:
    """Return the error of the first layer that is missing, or else of the first copy.

    `held` are the entries of the adapter in the model (`Carried`), `records` the roots that it was
    put on, each with its record.
    """
    carrying = {id(module): module for _, record in records for module in record.carrying[name]}
    there = {id(item.module): item for item in held}
    for key, module in carrying.items():
        if key not in there:
            in_model = any(id(root) in survey.paths for root, _ in records)
            return _lost(asked, name, module, in_model=in_model)
    copy = next(item for key, item in there.items() if key not in carrying)
    problem = f"layer {copy.path!r} has it, too, and inject did not put it there: it is a copy"
    remedy = "Copy layers before inject, or call eject(layer) of the copy"
    return StateError(asked, problem, remedy)


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
