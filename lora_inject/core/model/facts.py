"""What files of a format need to know of a live model and of an adapter on it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from lora_inject.core.adapter.exchange import format_of
from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import Carried, entries
from lora_inject.core.spec.rooms import room


def facts_for(survey: Survey, format: str, name: str) -> Callable[[], Any]:  # noqa: A002
    """Return a function of the facts that a format may ask for.

    Raises:
        FormatError: There is no such format, or its readers would compute something else.
    """
    row = format_of(format, f"save adapter {name!r}")
    if row.check_save is not None:
        row.check_save(survey, name)

    def facts() -> Any:
        idle = idle_among([*entries(survey, name)])
        notes = tuple(room("mixtures").notes_on_adapter(survey, name))
        return replace(room("formats").facts_about(survey), idle=idle, notes=notes)

    return facts


def idle_among(items: Collection[Carried]) -> tuple[str, ...]:
    """Return the names of sites and trained tensors that no forward has used, where others were."""
    idle = tuple(
        item.name
        for item in items
        if (attached := attached_to(item.module)) and item.entry.mark not in attached.took_part
    )
    return idle if len(idle) < len(items) else ()
