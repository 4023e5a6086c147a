"""A merge that is formed without being written, where it might not be finite, or is counted."""

from __future__ import annotations

from lora_inject.core.functional.rounded_fold import Tally
from lora_inject.core.model.merged_rows import merged_rows, not_finite
from lora_inject.core.model.packed_target import rehearse_packed
from lora_inject.core.model.target import Target


def check_rehearsed(target: Target) -> None:
    """Form all that would be written and count, without writing; raise if it is not finite."""
    if target.is_packed:
        rehearse_packed(target)
    else:
        target.tally = Tally()
        for start, rows in target.blocks():
            merged_rows(target, rows, start, target.tally)
    if target.tally is not None and not target.tally.finite:
        raise not_finite(target, target.weight)
