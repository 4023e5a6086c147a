"""The arithmetic of one update in the order that a CPU's caches like.

`linear` is right on every device; what is here gives the same values sooner on a CPU, and is chosen
by the device. Beside each special case stands what it gains, in points of a training step of a
Llama (4 blocks of width 768, 512 tokens, rank 8) on one core of an EPYC with AVX-512, in turn with
the operations of `linear`. Another special case has to gain more than two points.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_inject.functional.factors import Factors, cast

# Elements and least rows of one float32 block, which a core's own cache holds beside the factors.
BLOCK, BLOCK_ROWS = 3 * 2**15, 64
# Tokens of a decoding step.
FEW = 32
# Up to this probability positions take less memory than a mask of bytes.
KEEP_UP_TO = 0.125
_LEAST = 2.0**-25
"""Least uniform number, below all others of 24 bits: zero would be a gap without an end."""


class Kept(NamedTuple):
    """What the backward of one update needs beside x.

    Attributes:
        h: `drop(x) A^T`, `(n, rank * parts)`.
        A: As it was multiplied with; on a CPU as the update has it.
        B: Likewise.
        dropped: Without dropout None. Else which elements of x were kept, bool `(n, in)`; or on a
            CPU the gaps between those that were dropped, `(m,)`, integers.
    """

    h: Tensor
    A: Tensor
    B: Tensor
    dropped: Tensor | None


def is_cpu(t: Tensor) -> bool:
    """Whether a tensor is on a CPU: the one place that asks."""
    return t.device.type == "cpu"


def takes(t: Tensor, u: Factors) -> bool:
    """Whether an update is computed here."""
    return u.spans is None and u.dropout <= KEEP_UP_TO and is_cpu(t)


def add_(y2: Tensor, x2: Tensor, u: Factors, dtype: torch.dtype) -> Kept:
    """Add one update, computed in `dtype`, to the output `(n, out)` of a layer, in place."""
    scale, gaps = u.scale, None
    if are_few(x2, u):
        return Kept(cast(add_few_(y2, x2, u), dtype), u.A, u.B, None)
    if u.dropout:
        x2, scale = x2.clone(memory_format=torch.contiguous_format), scale / (1 - u.dropout)
        gaps = _draw_gaps(u.dropout, x2.numel())
        x2.view(-1).index_fill_(0, positions(gaps), 0.0)
    A, B = cast(u.A, dtype), cast(u.B, dtype)
    hs = [torch.mm(x, A.t()) for _, (x,) in _blocks(dtype, x2)]
    h = hs[0] if len(hs) == 1 else torch.cat(hs)
    _add_product_(y2, h, _turned(B), scale)
    return Kept(h, u.A, u.B, gaps)  # cast again, as a launch is cheap here and memory is not


def are_few(x: Tensor, u: Factors) -> bool:
    """Whether x has so few tokens that time is in the number of operations."""
    if x.numel() > FEW * x.shape[-1] or u.dropout or u.spans is not None or not is_cpu(x):
        return False
    dtype = u.A.dtype
    return 2 < dtype.itemsize >= x.dtype.itemsize and dtype == u.B.dtype


def add_few_(y: Tensor, x: Tensor, u: Factors) -> Tensor:
    """Add an update to the output of few tokens in place, in the dtype of its factors.

    Casting x and y takes less than casting A and B, and a single token is a vector: decoding one
    token of a layer of width 768 takes half as long as with the operations of `linear`. Returns
    `x A^T`, `(n, rank)`; y is contiguous.
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


def backward(
    g2: Tensor,
    x2: Tensor,
    gx2: Tensor | None,
    u: Factors,
    kept: Kept,
    needs: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of A and B where they are wanted; add to that of x, if any, in place."""
    scale, where = u.scale / (1 - u.dropout), None
    if kept.dropped is not None:
        where = positions(kept.dropped)
        x2 = x2.clone(memory_format=torch.contiguous_format) if needs[0] else x2
        x2 = x2.view(-1).index_fill_(0, where, 0.0).view(x2.shape) if needs[0] else x2
    A, B = cast(kept.A, dtype), _turned(cast(kept.B, dtype))
    h, ghs = _turned(kept.h), []
    gA = gB = None
    for rows, (g, x) in _blocks(dtype, g2, x2):
        gh = torch.mm(g, B.t())
        if needs[0]:
            gA = _plus(gA, _turned(gh), x)
        if needs[1]:
            gB = _plus(gB, h[:, rows], g)
        ghs.append(gh)
    if gx2 is not None:
        _add_share_(gx2, ghs[0] if len(ghs) == 1 else torch.cat(ghs), A, scale, where)
    gA = None if gA is None else gA.mul_(scale)
    return gA, None if gB is None else gB.t().mul_(scale)


def _add_share_(gx2: Tensor, gh: Tensor, A: Tensor, scale: float, where: Tensor | None) -> None:
    """Add `scale * gh A` to the gradient of x, but not where x was dropped."""
    if where is None:
        _add_product_(gx2, gh, A, scale)
        return
    flat = gx2.view(-1)
    before = flat.index_select(0, where)  # put back: half the time of a product with a mask
    _add_product_(gx2, gh, A, scale)
    flat.index_copy_(0, where, before)


def _turned(thin: Tensor) -> Tensor:
    """Return a thin matrix transposed, in memory of its own.

    Then every product has rows of contiguous numbers on both sides, or a thin matrix on the left:
    6 points of a float32 step.
    """
    return thin.t().contiguous()


def _plus(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right) if total is None else total.addmm_(left, right)


def _blocks(dtype: torch.dtype, *matrices: Tensor) -> Iterator[tuple[slice, Sequence[Tensor]]]:
    """Yield rows, and those rows of each matrix in `dtype`: all, or in blocks if one must be cast.

    A block stays in the cache from its cast to its product, in the same memory as the one before,
    so it is to be used before the next is asked for: 20 points of a step in float32 over bfloat16.
    """
    n = matrices[0].shape[0]
    if all(m.dtype == dtype for m in matrices):
        yield slice(0, n), matrices
        return
    step = max(BLOCK_ROWS, BLOCK // max(m.shape[1] for m in matrices))
    rooms = [m.new_empty(min(step, n), m.shape[1], dtype=dtype) for m in matrices]
    for start in range(0, max(1, n), step):
        rows = slice(start, min(start + step, n))
        pairs = zip(rooms, matrices, strict=True)
        yield rows, [room[: rows.stop - start].copy_(m[rows]) for room, m in pairs]


def _add_product_(y2: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add `scale * left @ right` to y2 in place, rounding once."""
    if y2.dtype == left.dtype:
        y2.addmm_(left, right, alpha=scale)
        return
    for rows, (block,) in _blocks(left.dtype, y2):
        y2[rows].copy_(block.addmm_(left[rows], right, alpha=scale))


# ------------------------------------------------------------------------------------- dropout
#
# What is dropped is a set of positions. Drawing the gaps between them takes a draw for each element
# that is dropped, where a mask takes one for each element: 15 points of a step with dropout 0.05.
# Gaps of independent draws are geometric, so the positions are distributed as a Bernoulli mask, but
# for gaps that one draw in 30 million would have made longer.


def _draw_gaps(p: float, n: int) -> Tensor:
    """Draw from torch's generator which of n elements are dropped, each with probability p.

    Returns the distance of each from the one before, 1 for neighbors, in the narrowest dtype.
    """
    expected = n * p
    draws = int(expected + 6 * math.sqrt(expected) + 16)
    # Uniform numbers of 24 bits tell gaps apart as long as one of them is not worth an element.
    dtype = torch.float32 if p > 2**-12 else torch.float64
    found = torch.empty(0, dtype=torch.int64)
    while not len(found) or int(found.sum()) < n + 1:
        uniform = torch.empty(draws, dtype=dtype).uniform_(_LEAST, 1)
        gaps = uniform.log_().mul_(1 / math.log1p(-p)).to(torch.int64).add_(1)
        found = gaps if not len(found) else torch.cat([found, gaps])
    ends = found.cumsum(0)
    found = found[: int(torch.searchsorted(ends, n, right=True))]
    largest = int(found.max()) if len(found) else 0
    sizes = (torch.uint8, torch.int16, torch.int32, torch.int64)
    return found.to(next(size for size in sizes if largest <= torch.iinfo(size).max))


def positions(gaps: Tensor) -> Tensor:
    """Return the flat positions that gaps lead to, ascending, int64.

    Examples:
        >>> positions(torch.tensor([3, 1, 6]))
        tensor([2, 3, 9])
    """
    return gaps.cumsum(0, dtype=torch.int64).sub_(1)


def mask(dropped: Tensor | None, like: Tensor) -> Tensor | None:
    """Return which elements of `like` were kept, from what `Kept` says of them."""
    if dropped is None or dropped.dtype == torch.bool:
        return dropped
    kept = torch.ones(like.numel(), dtype=torch.bool, device=like.device)
    return kept.index_fill_(0, positions(dropped), False).view(like.shape)
