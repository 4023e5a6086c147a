"""Whether values are finite, as those of an adapter must be before they reach a weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

_SMALL = 1 << 12  # elements of a tensor whose norm costs more to call than to compute


@torch.no_grad()
def all_finite(*tensors: Tensor) -> bool:
    """Whether tensors hold no NaN and no Inf, mostly by their norms; on meta they hold nothing.

    Examples:
        >>> all_finite(torch.ones(2)), all_finite(torch.ones(2), torch.tensor([1.0, torch.nan]))
        (True, False)
    """
    held = [t.float() if t.element_size() == 1 else t for t in tensors if not t.is_meta]
    norm = torch.nn.utils.get_total_norm(_joined([t for t in held if t.is_floating_point()]))
    return bool(torch.isfinite(norm)) or all(bool(torch.isfinite(t).all()) for t in held)


def _joined(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of the same values, in which small ones of one form are one.

    That takes less than half as long for an adapter of thousands of small sites.
    """
    joined, alike = [], defaultdict[Hashable, list[Tensor]](list)
    for t in tensors:
        if t.dim() > 0 and t.numel() < _SMALL:
            alike[t.shape[1:], t.dtype, t.device].append(t)
        else:
            joined.append(t)
    return [*joined, *map(torch.cat, alike.values())]


@torch.no_grad()
def lost_by_cast(before: Tensor, after: Tensor) -> bool:
    """Whether finite values became Inf in another dtype, or so many of them 0 that it counts.

    Examples:
        >>> small = torch.full((4,), 1e-9)
        >>> lost_by_cast(small, small.half()), lost_by_cast(small, small.bfloat16())
        (True, False)
    """
    if before.is_meta or before.dtype == after.dtype:
        return False
    finite = before.isfinite()
    lost, whole = (torch.where(finite, t, 0) for t in (before - after, before))
    lost, whole = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in (lost, whole))
    # Rounding to bfloat16 takes at most a 256th of each value.
    return not bool(lost <= whole / 64)
