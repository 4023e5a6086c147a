"""Layers whose input may have time before batch, so that its rows may be steps of time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.survey import Survey
from lora_inject.core.roots.carried import adapted_modules, known_roots, reach
from lora_inject.core.spec.names import parent
from lora_inject.errors import LayerError


def note_time_major(survey: Survey) -> None:
    """Note on the adapted layers next to a module with `batch_first=False` that they may be.

    A part of a model does not see what is next to it, so the roots that share its selections are
    looked at as well; and what one model has noted no other takes back.
    """
    selections = reach(survey.model, survey).selections
    roots = [module for module, record in known_roots() if record.selection in selections]
    for each in (survey, *map(Survey, roots)):
        parts = (name for name, m in each.named if m.__dict__.get("batch_first") is False)
        around = tuple({f"{parent(name)}." if parent(name) else "" for name in parts})
        for path, _, attached in adapted_modules(each) if around else ():
            if f"{path}.".startswith(around):
                attached.time_major = True


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
