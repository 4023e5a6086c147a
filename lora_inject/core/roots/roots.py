"""Becoming a root: which module may be injected, under which name, and what its layers share.

Most models are the only ones of their process, and get one adapter. `several_roots` knows the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_inject.core.layers.selection import Selection
from lora_inject.core.layers.survey import Carried, Survey
from lora_inject.core.roots.carried import (
    ROOT,
    ROOT_MODULES,
    Root,
    known_roots,
    reach,
    root_at,
    roots_of,
)
from lora_inject.core.roots.several_roots import check_free_name, check_not_nested, shared_selection
from lora_inject.errors import StateError


def records_with(selection: Selection) -> list[Root]:
    """Return the records of all models that share a selection."""
    return [record for _, record in known_roots() if record.selection is selection]


def become_root(survey: Survey, selection: Selection) -> Root:
    """Return the record of a model, which is a root from now on."""
    record = root_at(survey)
    if record is None:
        record = survey.model.__dict__[ROOT] = Root(selection)
        ROOT_MODULES.add(survey.model)
    return record


def _is_first(survey: Survey) -> bool:
    """Whether no model of the process has an adapter, as far as it is known."""
    return not (known_roots() or roots_of(survey) or reach(survey.model, survey).selections)


def check_new_adapter(survey: Survey, name: str) -> None:
    """Check that a model can get an adapter of that name now.

    Raises:
        StateError: It has one of that name, lies inside or around a root, is merged, or is in use.
    """
    if not isinstance(name, str) or not name:
        problem = "a name is a string of one character or more"
        raise StateError(f"adapter {name!r}", problem, "Give another name")
    if not _is_first(survey):
        check_not_nested(survey, f"adapter {name!r}")
        check_free_name(survey, name)


def selection_for(survey: Survey, wanted: Sequence[Carried], asked: str) -> Selection:
    """Return what the layers of a model share, or will if they have no adapter yet.

    Raises:
        StateError: Layers that are wanted have several already.
    """
    if _is_first(survey):
        return Selection()
    return shared_selection(survey, wanted, asked)
