"""Layers whose input may have time before batch, so that its rows may be steps of time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import adapted_modules
from lora_inject.core.spec.names import parent
from lora_inject.errors import LayerError


def note_time_major(survey: Survey) -> None:
    """Note on the adapted layers next to a module with `batch_first=False` that they may be."""
    parts = (name for name, m in survey.named if m.__dict__.get("batch_first") is False)
    around = tuple({f"{parent(name)}." if parent(name) else "" for name in parts})
    for path, _, attached in adapted_modules(survey):
        attached.time_major = bool(around) and f"{path}.".startswith(around)


def refuse_ambiguous(layer: Any, x: Tensor, n_rows: int, repeat: int) -> None:
    """Raise where time, before or after the batch, is as long as the batch."""
    attached = attached_to(layer)
    if attached is None or not attached.time_major:
        return
    if x.dim() > (2 if x.is_floating_point() else 1) and x.shape[1] in (n_rows, n_rows * repeat):
        raise LayerError(
            f"routed() with {n_rows} rows",
            f"a {type(layer).__name__} got an input of shape {tuple(x.shape)} next to a layer "
            "with batch_first=False: which dimension is the batch cannot be told",
            "Give batch_first=True, or pad the batch to another length",
        )
