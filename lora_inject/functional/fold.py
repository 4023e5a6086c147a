"""Folding: the delta added to rows of W in float32, and rounded once.

One idea: rows of a weight matrix can be merged one block of rows at a time, so that the float32
copies stay in the cache of a core and no tensor is ever held twice. What rounding to 16 bits leaves
of the delta is counted on the way, while the block is at hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_inject.sites import Block, SiteSpec

__all__ = ["Scratch", "Tally", "Term", "fold_block", "fold_rows", "fold_rows_"]


@dataclass(frozen=True)
class Term:
    """One low-rank update to fold into a weight.

    Attributes:
        spec: The site.
        A: `spec.a_shape`.
        B: `spec.b_shape`.
        weight: Mixing weight; -1 for the frozen start of a weight-derived init.
    """

    spec: SiteSpec
    A: Tensor
    B: Tensor
    weight: float = 1.0


@dataclass
class Tally:
    """Running sums over the row blocks of one tensor: what rounding left of the delta D.

    Attributes:
        finite: Whether every merged value is finite.
    """

    finite: bool = True
    _dd: float = field(default=0.0, repr=False)
    _ww: float = field(default=0.0, repr=False)
    _ed: float = field(default=0.0, repr=False)
    _rr: float = field(default=0.0, repr=False)

    def add(self, before: Tensor, wanted: Tensor, after: Tensor) -> None:
        """Count some rows.

        Args:
            before: W in the accumulation dtype.
            wanted: W + D, likewise.
            after: What is stored.
        """
        self.count(before, wanted - before, after.to(wanted.dtype) - before)

    def count(self, before: Tensor, delta: Tensor, effect: Tensor) -> None:
        """Count some rows, all in the accumulation dtype.

        Args:
            before: W.
            delta: D.
            effect: What W really changed by; used up.
        """
        self._ww += _dot(before, before)
        self._dd += _dot(delta, delta)
        self._ed += _dot(effect, delta)
        lost = effect.sub_(delta)
        self._rr += _dot(lost, lost)
        self.finite = self.finite and math.isfinite(self._rr)

    @property
    def delta_norm(self) -> float:
        """Frobenius norm of the delta."""
        return math.sqrt(self._dd)

    @property
    def weight_norm(self) -> float:
        """Frobenius norm of the weight."""
        return math.sqrt(self._ww)

    @property
    def kept(self) -> float:
        """`<W_merged - W, D> / <D, D>`: 1 where the delta survived, 0 where it was rounded away."""
        return self._ed / self._dd if self._dd else 1.0

    @property
    def error(self) -> float:
        """`|W_merged - W - D| / |D|`: relative error of the delta that the weights really got."""
        return math.sqrt(self._rr / self._dd) if self._dd else 0.0


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))


class Scratch:
    """Buffers that a pass over many blocks of rows uses again, so that it allocates nothing."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.Size, torch.dtype, torch.device], Tensor] = {}

    def like(self, name: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised buffer of the shape of `rows`, the same one each time."""
        key = (name, rows.shape, dtype, rows.device)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        return self._buffers[key]


def fold_rows(
    rows: Tensor,
    start: int,
    terms: Sequence[Term],
    dtype: torch.dtype | None = None,
    tally: Tally | None = None,
    scratch: Scratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return some rows of the weight matrix with all terms added, rounded once.

    Args:
        rows: `(n, cols)`: rows `start` to `start + n` of the weight matrix; modified only where
            they are `out`.
        start: Index of the first row.
        terms: The updates.
        dtype: Dtype of the result; that of `rows` by default.
        tally: Counts what rounding left, where given.
        scratch: Buffers to use again; new ones by default.
        out: Where the result goes, possibly `rows` itself; a new tensor by default.

    Returns:
        `(n, cols)`. Accumulated in float32, or in float64 for a float64 weight. Values outside
        every block come back with the same bits.
    """
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    scratch = scratch or Scratch()
    total = scratch.like("total", rows, wide).copy_(rows)
    if out is None:
        out = torch.empty(rows.shape, dtype=dtype or rows.dtype, device=rows.device)
    if tally is None:
        fold_rows_(total, start, terms)
        return out.copy_(total)
    delta = scratch.like("delta", rows, wide).zero_()
    fold_rows_(delta, start, terms)
    wanted = torch.add(total, delta, out=scratch.like("wanted", rows, wide))
    out.copy_(wanted)
    tally.count(total, delta, wanted.copy_(out).sub_(total))
    return out


def fold_rows_(rows: Tensor, start: int, terms: Sequence[Term]) -> None:
    """Add all terms to some rows of a float32 or float64 weight matrix, in place.

    Args:
        rows: `(n, cols)`: rows `start` to `start + n` of the weight matrix.
        start: Index of the first row.
        terms: The updates.
    """
    for term in terms:
        A = term.A.reshape(-1, term.spec.in_features)
        B = term.B.reshape(-1, term.spec.rank)
        scale = term.spec.scale * term.weight
        for block in term.spec.blocks:
            fold_block(rows, start, block, A, B, scale, term.spec.transposed)


def fold_block(
    total: Tensor,
    start: int,
    block: Block,
    A: Tensor,
    B: Tensor,
    scale: float,
    transposed: bool,
) -> None:
    """Add the part of one block that falls on rows `start` to `start + n`.

    Args:
        total: `(n, cols)`, float32 or float64; changed in place.
        start: Index of its first row in the weight matrix.
        block: The block.
        A: A of the site, flattened to two dimensions.
        B: B of the site, likewise.
        scale: Factor on `B @ A`.
        transposed: Whether the weight matrix is `(in, out)`.
    """
    first, last = max(block.rows[0], start), min(block.rows[1], start + total.shape[0])
    if first >= last:
        return
    a, b = A[slice(*block.a)].to(total.dtype), B[slice(*block.b)].to(total.dtype)
    left, right = (a.t(), b.t()) if transposed else (b, a)
    left = left[first - block.rows[0] : last - block.rows[0]]
    target = total[first - start : last - start, slice(*block.cols)]
    target.addmm_(left, right, alpha=scale)
