"""Dropout of the input of A, which keeps what was dropped in the least memory.

On a CPU what is dropped is a set of positions, kept as the gaps between them. To draw gaps takes a
draw for each element that is dropped, where a mask takes one for each element: 24 points of a step
with dropout 0.05, and on a Xeon with AMX 10 in float32 and 46 in bfloat16. Gaps of independent
draws are geometric, so the positions are distributed as a Bernoulli mask, but for gaps that one
draw in 30 million would have made longer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_inject.core.functional import cpu
from lora_inject.core.functional.torch_inside import is_recorded
from lora_inject.core.functional.wide_products import plus_wide_product

# Up to this probability gaps take less memory than a mask of bytes.
GAPS_UP_TO = 0.125


def drop(x2: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return `dropout(x2)`, and the dropped elements in the form of `Kept` of `linear`."""
    if p > GAPS_UP_TO or not cpu.is_cpu(x2):
        return torch.native_dropout(x2, p, True)
    gaps = _draw_gaps(p, x2.numel())
    scaled = torch.mul(x2, 1 / (1 - p)).contiguous().view(-1)
    if is_recorded():
        scaled = scaled.index_fill(0, positions(gaps), 0.0)
    else:
        scaled.index_fill_(0, positions(gaps), 0.0)
    return scaled.view(x2.shape), gaps


def without(x2: Tensor, dropped: Tensor) -> Tensor:
    """Return `x2` with zeros where it was dropped, not scaled."""
    if dropped.dtype == torch.bool:
        return x2 * dropped
    kept = x2.clone(memory_format=torch.contiguous_format)
    kept.view(-1).index_fill_(0, positions(dropped), 0.0)
    return kept


def plus_share(gx2: Tensor | None, gh: Tensor, A: Tensor, scale: float, dropped: Tensor) -> Tensor:
    """Return `gx2 + scale * gh A`, except where x was dropped; in place if `gx2` is given."""
    if dropped.dtype != torch.bool:
        return _plus_share_between_gaps(gx2, gh, A, scale, positions(dropped))
    share = torch.mm(gh, A)
    if gx2 is None:
        return share.mul_(dropped).mul_(scale)
    return gx2.addcmul_(share, dropped, value=scale)


def _plus_share_between_gaps(
    gx2: Tensor | None, gh: Tensor, A: Tensor, scale: float, where: Tensor
) -> Tensor:
    if gx2 is None:
        share = torch.mm(gh, A).mul_(scale)
        share.view(-1).index_fill_(0, where, 0.0)
        return share
    flat = gx2.view(-1)
    before = flat.index_select(0, where)  # restored below: half the time of a product with a mask
    if gx2.dtype == gh.dtype:
        gx2.addmm_(gh, A, alpha=scale)
    else:
        plus_wide_product(gx2, gh, A, scale, in_place=True)
    flat.index_copy_(0, where, before)
    return gx2


def _draw_gaps(p: float, n: int) -> Tensor:
    """Draw from torch's generator which of n elements are dropped, each with probability p.

    Returns the distance of each from the one before, 1 for neighbors, in the narrowest dtype.
    """
    expected = n * p
    draws = int(expected + 6 * math.sqrt(expected) + 16)
    # Uniform numbers of 24 bits tell gaps apart as long as one of them is not worth an element.
    dtype = torch.float32 if p > 2**-12 else torch.float64
    gaps_so_far = torch.empty(0, dtype=torch.int64, device="cpu")
    while not len(gaps_so_far) or int(gaps_so_far.sum()) < n + 1:
        # Out of place, as a mode may keep each result. Of 1 - u no number is zero.
        uniform = 1 - torch.rand(draws, dtype=dtype, device="cpu")
        gaps = uniform.log().mul(1 / math.log1p(-p)).to(torch.int64).add(1)
        gaps_so_far = gaps if not len(gaps_so_far) else torch.cat([gaps_so_far, gaps])
    ends = gaps_so_far.cumsum(0)
    gaps_so_far = gaps_so_far[: int(torch.searchsorted(ends, n, right=True))]
    largest = int(gaps_so_far.max()) if len(gaps_so_far) else 0
    sizes = (torch.uint8, torch.int16, torch.int32, torch.int64)
    return gaps_so_far.to(next(size for size in sizes if largest <= torch.iinfo(size).max))


def positions(gaps: Tensor) -> Tensor:
    """Return the flat positions that gaps lead to, ascending, int64.

    Examples:
        >>> positions(torch.tensor([3, 1, 6]))
        tensor([2, 3, 9])
    """
    return gaps.cumsum(0, dtype=torch.int64).sub(1)


def mask(dropped: Tensor, like: Tensor) -> Tensor:
    """Return which elements of `like` were kept, from what `Kept` says of them."""
    if dropped.dtype == torch.bool:
        return dropped
    kept = torch.ones(like.numel(), dtype=torch.bool, device=like.device)
    return kept.index_fill_(0, positions(dropped), False).view(like.shape)
