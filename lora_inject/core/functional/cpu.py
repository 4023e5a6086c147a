"""Faster operations for CPUs, chosen by the device alone.

`linear` is correct on every device; these operations give the same values in less time. Each one
states its gain in percentage points of a training step of a Llama (3 blocks of width 768, 512
tokens, rank 8) on one core, compared with the operations of `linear`. Others are worth adding above
two points.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_inject.core.functional import inside
from lora_inject.core.functional.factors import Update

# Tokens of a decoding step.
FEW = 32
# Up to this probability positions take less memory than a mask of bytes.
KEEP_UP_TO = 0.125


def is_cpu(t: Tensor) -> bool:
    """Whether a tensor is on a CPU and no DTensor, which has fewer operations: it is asked here."""
    return t.device.type == "cpu" and not hasattr(t, "full_tensor")


def are_few(x: Tensor, u: Update) -> bool:
    """Whether x has so few tokens that time is in the number of operations."""
    if x.numel() > FEW * x.shape[-1] or u.dropout or u.spans is not None or not is_cpu(x):
        return False
    dtype = u.A.dtype
    return 2 < dtype.itemsize >= x.dtype.itemsize and dtype == u.B.dtype


def add_few_(y: Tensor, x: Tensor, u: Update) -> Tensor:
    """Add an update to the output of few tokens in place, in the dtype of its factors.

    Casting x and y takes less than casting A and B, and a single token is a vector: decoding one
    token of a layer of width 768 takes half as long as with the operations of `linear`. It is done
    with gradients on as well, so that a token has the same bits. Returns `x A^T`, `(n, rank)`; y is
    contiguous.
    """
    A, B, dtype = u.A, u.B, u.A.dtype
    if y.dtype == x.dtype == dtype and x.numel() == x.shape[-1]:
        vector = torch.mv(A, x.reshape(-1))
        y.view(-1).addmv_(B, vector, alpha=u.scale)
        return vector[None]
    # As a matrix: else torch would choose its product by `A.requires_grad`.
    x2 = x.reshape(-1, x.shape[-1])
    h = torch.mm(x2 if x.dtype == dtype else x2.to(dtype), A.t())
    y2 = y.view(-1, y.shape[-1])
    if y.dtype == dtype:
        y2.addmm_(h, B.t(), alpha=u.scale)
    else:
        y2.add_(torch.mm(h, B.t()), alpha=u.scale)
    return h


def plus_wide_product(
    y: Tensor, left: Tensor, right: Tensor, scale: float, *, in_place: bool
) -> Tensor:
    """Return `y + scale * left @ right` for a y in 16 bits and factors in float32.

    An addition of two dtypes is slow: 21 points of a step in float32 over bfloat16.
    """
    wide = y.to(left.dtype, memory_format=torch.contiguous_format)
    (wide.addmm_ if y.dim() == 2 else wide.baddbmm_)(left, right, alpha=scale)
    return y.copy_(wide) if in_place else wide.to(y.dtype)


# ------------------------------------------------------------------------------------- dropout
#
# What is dropped is a set of positions. Drawing the gaps between them takes a draw for each element
# that is dropped, where a mask takes one for each element: 24 points of a step with dropout 0.05,
# and on a Xeon with AMX 10 in float32 and 46 in bfloat16.
# Gaps of independent draws are geometric, so the positions are distributed as a Bernoulli mask, but
# for gaps that one draw in 30 million would have made longer.


def drop(x2: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return `dropout(x2)`, and the dropped elements in the form of `linear.Kept`."""
    if p > KEEP_UP_TO or not is_cpu(x2):
        return torch.native_dropout(x2, p, True)
    gaps = _draw_gaps(p, x2.numel())
    scaled = torch.mul(x2, 1 / (1 - p)).contiguous().view(-1)
    if inside.is_recorded():
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
    where = positions(dropped)
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


def mask(dropped: Tensor | None, like: Tensor) -> Tensor | None:
    """Return which elements of `like` were kept, from what `Kept` says of them."""
    if dropped is None or dropped.dtype == torch.bool:
        return dropped
    kept = torch.ones(like.numel(), dtype=torch.bool, device=like.device)
    return kept.index_fill_(0, positions(dropped), False).view(like.shape)
