"""Weights that were replaced, moved or edited after a merge: which `unmerge` refuses, in words."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch

from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.undo import Undone, checksum
from lora_inject.errors import StateError


def check_undone(undo: Undone, survey: Survey, discard: bool) -> None:
    """Check that the weight is still the one that was merged, in a layer of the model."""
    asked = f"unmerge of {undo.holder.name!r}"
    for problem, remedy in chain(_not_in_place(undo, survey), _not_as_written(undo, discard)):
        raise StateError(asked, problem, remedy)


def _not_in_place(undo: Undone, survey: Survey) -> Iterator[tuple[str, str]]:
    """Yield why what stands in the layer cannot be restored."""
    if id(undo.holder.module) not in survey.paths:
        yield "its layer is not in the model any more", "Put the layer back first"
    now = _standing(undo)
    same = now is undo.merged or now is undo.before
    if same and undo.layer is not None and now.device != undo.before.device:
        remedy = f"Move the model back to {undo.before.device} first"
        yield f"it was moved to {now.device} since the merge", remedy
    if not same or (undo.original is not None and now.numel() != undo.original.numel()):
        problem = "the weight was replaced since the merge, and what was kept is not its base"
        remedy = "Put the merged Parameter back, or eject the adapters and load the base again"
        yield problem, remedy


def _not_as_written(undo: Undone, discard: bool) -> Iterator[tuple[str, str]]:
    """Yield why the values that stand there must not be written over."""
    now = _standing(undo)
    if undo.layer is None and now.is_cpu and now.is_shared():
        problem = "it is in memory that other processes share, which count on what is merged"
        yield problem, "Call unmerge before share_memory(), or on a copy.deepcopy"
    if not discard and _edited(undo, now):
        remedy = "Call unmerge(model, discard=True) to drop the change, or eject(model) to keep it "
        remedy += "with what was merged"
        yield "its values were changed since the merge, which unmerge would drop", remedy


def _standing(undo: Undone) -> Any:
    """Return what stands in the place of the weight now."""
    return undo.holder.module._parameters.get(undo.holder.param)


def _edited(undo: Undone, now: Any) -> bool:
    """Whether a weight has other values than were written; not known once it was cast."""
    if now is not undo.merged or undo.written is None or now.dtype != undo.written[0]:
        return False
    if int(checksum(now)) == int(undo.written[1]):
        return False
    if undo.original is None:
        return True
    # An interrupted call may have restored it already.
    return not torch.equal(now.detach(), undo.original.to(now.device).view(now.shape))


def nothing_to_restore(*, merged: bool) -> StateError:
    """Return the error where nothing is merged, or a merge kept nothing."""
    if not merged:
        return StateError("unmerge", "nothing is merged", "Call merge(model) first")
    problem = "the merge kept nothing to restore (undo=False)"
    remedy = "Eject the adapters, load the base weights, then load the adapters again"
    return StateError("unmerge", problem, remedy)
