"""What files of a format need to know of a live model and of an adapter on it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.survey import Carried, Survey
from lora_inject.core.roots.carried import entries, records_of
from lora_inject.core.spec.config import WORDS
from lora_inject.core.spec.experts import left_out
from lora_inject.formats.exchange import format_of
from lora_inject.formats.live_models import facts_about, refuse_misread


def facts_for(survey: Survey, format: str, name: str) -> Callable[[], Any]:  # noqa: A002
    """Return a function of the facts that a format may ask for.

    Raises:
        FormatError: There is no such format, or its readers would compute something else.
    """
    row = format_of(format, f"save adapter {name!r}")
    if row.by_peft:
        refuse_misread(survey, name)

    def facts() -> Any:
        idle = idle_among([*entries(survey, name)])
        notes = tuple(notes_on_adapter(survey, name))
        return replace(facts_about(survey), idle=idle, notes=notes)

    return facts


def idle_among(items: Collection[Carried]) -> tuple[str, ...]:
    """Return the names of sites and trained tensors that no forward has used, where others were."""
    idle = tuple(
        item.name
        for item in items
        if (attached := attached_to(item.module)) and item.entry.mark not in attached.took_part
    )
    return idle if len(idle) < len(items) else ()


def notes_on_adapter(survey: Survey, adapter: str) -> Iterator[str]:
    """Yield what an adapter on a model leaves out of experts, by the rules that it was made by."""
    configs = [root.configs.get(adapter) or {} for _, root in records_of(survey, adapter)]
    targets = [rule for config in configs for rule in config.get("targets", ())]
    words = {rule if isinstance(rule, str) else rule["match"] for rule in targets} & WORDS
    if words:
        there = inventory(survey).mixtures
        taken = (item.entry.spec for item in entries(survey, adapter))
        yield from left_out(words, there, {spec.name for spec in taken if spec is not None})
