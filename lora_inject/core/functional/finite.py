"""Whether values are finite, as those of an adapter must be before they reach a weight."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements that are joined for one sum: they stay in a core's cache.
BLOCK_ELEMENTS = 1 << 16


@torch.no_grad()
def all_finite(*tensors: Tensor) -> bool:
    """Whether tensors hold no NaN and no Inf, mostly by a few sums; on meta they hold nothing.

    Examples:
        >>> all_finite(torch.ones(2)), all_finite(torch.ones(2), torch.tensor([1.0, torch.nan]))
        (True, False)
    """
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        alike.setdefault((t.device, t.dtype), []).append(t)
    held = [group for (device, _), group in alike.items() if device.type != "meta"]
    return all(map(_have_finite_sum, held)) or all(
        bool(torch.isfinite(t).all()) for group in held for t in group
    )


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


def _have_finite_sum(alike: list[Tensor]) -> bool:
    """Whether tensors of one dtype and device have finite sums."""
    # Small ones are joined, in blocks that stay in the cache: a sum for each takes 4 times as long.
    step = max(1, BLOCK_ELEMENTS * len(alike) // max(1, sum(t.numel() for t in alike)))
    sums = []
    for i in range(0, len(alike), step):
        some = alike[i : i + step]
        joined = some[0] if step == 1 else torch.cat([t.reshape(-1) for t in some])
        sums.append((joined.float() if joined.element_size() == 1 else joined).sum())
    return bool(torch.isfinite(torch.stack(sums)).all())
