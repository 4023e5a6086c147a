"""Checkpoints around compiled layers: each notes, when it begins, who takes part.

In a compiled graph no Python code of this package runs, so a compiled layer cannot tell the
checkpoint that it runs in. From the first traced graph on, torch's two kinds of checkpoints are
asked for their function when they begin.
"""

from __future__ import annotations

import functools
from typing import Any

from torch.utils import checkpoint as torchs

from lora_inject.core.functional.patches import patch
from lora_inject.core.functional.torch_stack import checkpoints
from lora_inject.core.layers.checkpointing import Recomputed, recomputed
from lora_inject.core.layers.selection import SELECTIONS, alive
from lora_inject.private_needed import needed


def watch_checkpoints() -> None:
    """Let the checkpoints that run now, and all that begin from now on, note who takes part."""
    frame = needed("torch.utils.checkpoint._CheckpointFrame", "an adapter in a compiled graph")
    patch(frame, "__init__", _beginning)
    patch(torchs.CheckpointFunction, "apply", _applying)
    for running in checkpoints():
        running.function = noted(running.function)


def noted(function: Any) -> Recomputed:
    """Return a checkpointed function that runs again under what compiled code sees now."""
    wrapped = recomputed(function)
    for selection in alive(SELECTIONS):
        wrapped.note(selection, selection.of_thread(), compiled=True)
    return wrapped


def _beginning(begin: Any) -> Any:
    """Return what makes a checkpoint that is not reentrant."""

    @functools.wraps(begin)
    def beginning(self: Any, recompute_fn: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, noted(recompute_fn), *args, **kwargs)

    return beginning


def _applying(apply: Any) -> Any:
    """Return what runs a reentrant checkpoint."""

    def applying(run_function: Any, *args: Any) -> Any:
        return apply(noted(run_function), *args)

    return staticmethod(applying)
