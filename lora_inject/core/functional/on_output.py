"""Updates that are added to the output of a layer which runs by itself: a quantized or unknown one.

They are added out of place: such a layer may need its output in its own backward, or return a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor

from lora_inject.core.functional.factors import Update, needs_plain_operations, without_autocast
from lora_inject.core.functional.linear import apply_updates
from lora_inject.core.functional.plain_operations import add_to_nested, plain_updates


def add_updates(
    y: Tensor, x: Tensor, updates: Sequence[Update], *, float32: bool = False
) -> Tensor:
    """Add low-rank updates, out of place, to the output y of a layer that was called with x."""
    if y.is_nested:
        return add_to_nested(y, x, updates)
    with without_autocast(y) or nullcontext():
        if needs_plain_operations():
            return plain_updates(y, x, updates, [None] * len(updates), float32)
        return apply_updates(x, updates, y=y, float32=float32)
