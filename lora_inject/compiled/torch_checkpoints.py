"""Checkpoints around compiled layers: each notes, when it begins, who takes part.

In a compiled graph no Python code of this package runs, so a compiled layer cannot tell the
checkpoint that it runs in. From the first traced graph on, torch's two kinds of checkpoints are
asked for their function when they begin. The last selection takes this back when it goes.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch.utils import checkpoint as torchs

from lora_inject.core.functional.call_stack import checkpoints
from lora_inject.core.layers.checkpointing import Recomputed, recomputed
from lora_inject.core.layers.selection import SELECTIONS, alive
from lora_inject.private_needed import needed

_FRAME = "torch.utils.checkpoint._CheckpointFrame"
_originals: dict[str, Any] = {}


def watch_checkpoints() -> None:
    """Let the checkpoints that run now, and all that begin from now on, note who takes part."""
    if not _originals:
        _watch()
    for selection in alive(SELECTIONS):
        weakref.finalize(selection, _take_back)
    for running in checkpoints():
        running.function = noted(running.function)


def noted(function: Any) -> Recomputed:
    """Return a checkpointed function that runs again under what compiled code sees now."""
    wrapped = recomputed(function)
    for selection in alive(SELECTIONS):
        wrapped.note(selection, selection.of_thread(), compiled=True)
    return wrapped


def _watch() -> None:
    """Wrap the functions of all checkpoints that begin from now on."""
    frame = needed(_FRAME, "an adapter in a compiled graph")
    begin = frame.__init__
    apply = torchs.CheckpointFunction.apply
    _originals.update(begin=begin, apply=torchs.CheckpointFunction.__dict__.get("apply"))

    @functools.wraps(begin)
    def beginning(self: Any, recompute_fn: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, noted(recompute_fn), *args, **kwargs)

    def applying(run_function: Any, *args: Any) -> Any:
        return apply(noted(run_function), *args)  # type: ignore[no-untyped-call]

    frame.__init__ = beginning
    torchs.CheckpointFunction.apply = staticmethod(applying)  # type: ignore[method-assign]


def _take_back() -> None:
    """Give torch its functions back, once no selection is left."""
    if alive(SELECTIONS) or not _originals:
        return
    needed(_FRAME, "an adapter in a compiled graph").__init__ = _originals["begin"]
    own = _originals["apply"]
    if own is None:
        del torchs.CheckpointFunction.apply
    else:
        torchs.CheckpointFunction.apply = own  # type: ignore[method-assign]
    _originals.clear()
