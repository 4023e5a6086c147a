"""Putting an adapter that is a value onto a live model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.attach import survey_for
from lora_inject.core.model.base import Base
from lora_inject.core.model.fit_state import Part, fit
from lora_inject.core.model.load import M, copied, put_on_model
from lora_inject.core.model.stages import put_on_by_all
from lora_inject.errors import check_type


def install(
    model: M,
    state: AdapterState,
    name: str = "default",
    *,
    leave_out: Sequence[str] = (),
    base: Base = "same",
    leave_new: bool = False,
    group: Any = None,
) -> M:
    """Put an adapter, as a value, onto a model; see `load_adapter`.

    Args:
        model: The model.
        state: The adapter; its tensors are copied.
        name: Its name on this model.
        leave_out: Patterns of trained tensors and sites to let go.
        base: How sure to be of the base.
        leave_new: Whether weights may differ that no checkpoint of this model had.
        group: Processes of which each has other layers of the model; see `inject`. Each has the
            whole value, and takes what it has layers for. All raise, or none.

    Returns:
        The same object.

    Raises:
        FormatError: It does not fit the model. Nothing was changed.
        StateError: The name is in use, or the model is merged.
    """
    check_type("install", state, AdapterState, "Give an AdapterState; load_adapter reads files")
    fit_to = partial(fit, leave_out=leave_out, base=base, leave_new=leave_new, asked="install")

    def fitted(part: Part | None = None) -> tuple[Survey, AdapterState]:
        survey = survey_for(model, name)
        return survey, fit_to(survey, state, part=part)

    def put_on(survey: Survey, mine: AdapterState, last: Callable[[], None] = lambda: None) -> None:
        put_on_model(survey, mine, name, copied, last=last)

    if group is not None:
        put_on_by_all(group, "install", fitted, put_on)
    else:
        put_on(*fitted())
    return model
