"""Putting an adapter that is a value onto a live model."""

from __future__ import annotations

from collections.abc import Sequence

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.model.attach import survey_for
from lora_inject.core.model.base import Base
from lora_inject.core.model.callers import Alone
from lora_inject.core.model.fit_state import fit
from lora_inject.core.model.load import M, copied, put_on_model
from lora_inject.core.spec.garbage import few_collections
from lora_inject.errors import check_type


@few_collections()
def install(
    model: M,
    state: AdapterState,
    name: str = "default",
    *,
    leave_out: Sequence[str] = (),
    base: Base = "same",
    leave_new: bool = False,
) -> M:
    """Put an adapter, as a value, onto a model; see `load_adapter`.

    Args:
        model: The model.
        state: The adapter; its tensors are copied.
        name: Its name on this model.
        leave_out: Patterns of trained tensors and sites to let go.
        base: How sure to be of the base.
        leave_new: Whether weights may differ that no checkpoint of this model had.

    Returns:
        The same object.

    Raises:
        FormatError: It does not fit the model. Nothing was changed.
        StateError: The name is in use, or the model is merged.
    """
    check_type("install", state, AdapterState, "Give an AdapterState; load_adapter reads files")
    survey = survey_for(model, name, loads=True)
    fitted = fit(
        survey, state, Alone(), leave_out=leave_out, base=base, leave_new=leave_new, asked="install"
    )
    put_on_model(survey, fitted, name, copied)
    return model
