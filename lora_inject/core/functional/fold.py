"""Fold deltas into rows of W, one block at a time, which stays in the cache of a core.

A W in 16 bits is added to in float32 and rounded once. A tally counts in the same pass how much of
the delta is left after rounding.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from lora_inject.core.functional.factors import Patch
from lora_inject.core.functional.gain import Gain, norms_of
from lora_inject.core.functional.merge_report import TensorReport

# Elements of a block: what is computed on them stays in a core's cache from one step to the next. A
# merge takes a third longer with blocks of a quarter.
BLOCK_ELEMENTS = 1 << 17


def rows_at_once(matrix: Tensor) -> int:
    """Return how many rows to fold at once."""
    return max(1, _elements_at_once(matrix) // max(1, matrix.shape[1]))


def _elements_at_once(tensor: Tensor) -> int:
    """Return how many elements to take at once: a block for each thread of a CPU, 192 elsewhere."""
    return BLOCK_ELEMENTS * (torch.get_num_threads() if tensor.device.type == "cpu" else 192)


Memory = Callable[[torch.dtype, int, int], Tensor]
"""Function of a dtype, rows and columns to a tensor of that shape with any values."""


class _Part(NamedTuple):
    """`left @ right`, added to rows `first` to `last` and some columns of a weight matrix."""

    first: int
    last: int
    cols: slice
    left: Tensor
    right: Tensor


class Delta:
    """The sum of several terms for one weight matrix: prepared once, computed block by block.

    Args:
        terms: The updates.
        dtype: Dtype of the arithmetic.
        gain: The gain on the outputs of `W + delta`, if there is one.

    Examples:
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> spec = SiteSpec("q", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> A, B = torch.randn(2, 4), torch.randn(6, 2)
        >>> rows = Delta([Patch(spec, A, B)]).add_(torch.zeros(3, 4), start=1)
        >>> torch.allclose(rows, 2.0 * (B @ A)[1:4], atol=1e-6)
        True
    """

    def __init__(
        self,
        terms: Sequence[Patch],
        dtype: torch.dtype = torch.float32,
        gain: Gain | None = None,
    ) -> None:
        self.dtype = dtype
        self.gain = None if gain is None else gain.to(dtype)
        self._by_columns = bool(terms) and terms[0].spec.transposed
        self._gains: Tensor | None = None
        parts = [part for term in terms for part in _parts(term, dtype)]
        self._parts = sorted(parts, key=lambda part: part.first)
        self._firsts = [part.first for part in self._parts]
        self._lasts = list(accumulate((part.last for part in self._parts), max))

    def add_(self, rows: Tensor, start: int) -> Tensor:
        """Add the delta to rows `(n, cols)` from `start` on, in place.

        Values outside every block keep their bits.
        """
        return _added(rows, self._on(start, len(rows)))

    def over_(self, rows: Tensor, start: int) -> Tensor:
        """Write the delta over rows `(n, cols)`, and -0.0 outside every block.

        -0.0 keeps the bits of any value that it is added to.
        """
        parts = self._on(start, len(rows))
        if parts and (len(parts[0].left), parts[0].right.shape[1]) == rows.shape:
            torch.mm(parts[0].left, parts[0].right, out=rows)
            return _added(rows, parts[1:])
        return _added(rows.fill_(-0.0), parts)

    def _on(self, start: int, n: int) -> list[_Part]:
        """Return the parts of n rows from `start` on, which are 0 to n there."""
        stop = start + n
        reaching = slice(bisect_right(self._lasts, start), bisect_left(self._firsts, stop))
        parts = []
        for part in self._parts[reaching]:
            first, last = max(part.first, start), min(part.last, stop)
            if first < last:
                left = part.left[first - part.first : last - part.first]
                parts.append(_Part(first - start, last - start, part.cols, left, part.right))
        return parts

    def norms_of(self, blocks: Iterable[tuple[int, Tensor]]) -> None:
        """Compute the norms of outputs that are columns before `fold_`, since they need all rows.

        `blocks` are `(first row, rows)` of W. Outputs that are rows need no such pass.
        """
        if self.gain is None or not self._by_columns:
            return
        squares: Tensor | None = None
        for start, rows in blocks:
            total = self.add_(rows.to(self.dtype, copy=True), start)
            mine = total.square().sum(dim=0, dtype=torch.float64)
            squares = mine if squares is None else squares + mine
        assert squares is not None
        self._gains = self.gain.of(squares.sqrt().to(self.dtype))

    def fold_(self, rows: Tensor, start: int) -> Tensor:
        """Add the delta to rows `(n, cols)` from `start` on and multiply by a gain, in place."""
        total = self.add_(rows, start)
        if self.gain is None:
            return total
        if self._gains is not None:
            return total.mul_(self._gains)
        return total.mul_(self.gain.of(norms_of(total, False), start)[:, None])


def _added(rows: Tensor, parts: Sequence[_Part]) -> Tensor:
    for part in parts:
        rows[part.first : part.last, part.cols].addmm_(part.left, part.right)
    return rows


def _parts(term: Patch, dtype: torch.dtype) -> list[_Part]:
    """Return the blocks of a term, with the scale in B and everything in its dtype."""
    spec = term.spec
    A = term.A.detach().reshape(-1, spec.in_features).to(dtype)
    B = term.B.detach().reshape(-1, spec.rank).to(dtype) * term.scale
    parts = []
    for block in spec.blocks:
        a, b = A[slice(*block.a)], B[slice(*block.b)]
        left, right = (a.t(), b.t()) if spec.transposed else (b, a)
        parts.append(_Part(*block.rows, slice(*block.cols), left, right))
    return parts


def mix_copies(
    rows: Tensor, copies: Sequence[tuple[Tensor, float]], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return `W + sum of w (T - W)` over trained copies `(T, w)` of some rows of W, a new tensor.

    For one copy of weight 1 the result is exactly T.

    Examples:
        >>> W, T = torch.zeros(2, 2), torch.ones(2, 2)
        >>> mix_copies(W, [(T, 0.5), (T, 0.25)])[0, 0].item()
        0.75
    """
    if len(copies) == 1 and copies[0][1] == 1:
        return copies[0][0].detach().to(dtype, copy=True)
    base = rows.to(dtype)
    total = base.clone()
    for copy, weight in copies:
        total += weight * (copy.detach().to(dtype) - base)
    return total


@dataclass
class Tally:
    """How much of the delta D of a tensor W is left after rounding: sums over its rows.

    R is `W + D - W_merged`, and `eps` of the dtype that W and D were added in.
    """

    ww: float = 0.0
    dd: float = 0.0
    rd: float = 0.0
    rr: float = 0.0
    eps: float = 0.0

    def count(self, before: Tensor, delta: Tensor, lost: Tensor) -> None:
        """Count some rows of W, D and R."""
        self.take(sums_of(before, delta, lost), before.dtype)

    def take(self, sums: list[Tensor], dtype: torch.dtype) -> None:
        """Add what `sums_of` has given of several rows, in a dtype: a GPU is waited for here."""
        found = iter(torch.stack(sums).tolist() if sums else ())
        for ww, dd, rd, rr in zip(found, found, found, found, strict=True):
            self.add(Tally(ww, dd, rd, rr, torch.finfo(dtype).eps))

    def add(self, other: Tally) -> None:
        """Add the tally of other rows of the same tensor."""
        self.ww, self.dd = self.ww + other.ww, self.dd + other.dd
        self.rd, self.rr = self.rd + other.rd, self.rr + other.rr
        self.eps = max(self.eps, other.eps)

    @property
    def finite(self) -> bool:
        """Whether every merged value is finite."""
        return math.isfinite(self.rr)

    @property
    def counted(self) -> bool:
        """Whether any delta was counted."""
        return self.eps > 0

    @property
    def delta_norm(self) -> float:
        """Frobenius norm of the delta."""
        return math.sqrt(self.dd)

    @property
    def weight_norm(self) -> float:
        """Frobenius norm of the weight."""
        return math.sqrt(self.ww)

    @property
    def kept(self) -> float:
        """`<W_merged - W, D> / <D, D>`: 1 where the delta survived, 0 where it was rounded away."""
        if not self.dd:
            return 1.0
        effect = self.dd - self.rd
        # W + D is itself rounded to float32: a smaller error counts as zero.
        noise = self.eps / 2 * math.sqrt(self.ww * self.dd)
        return effect / self.dd if not abs(effect) <= noise else 0.0

    @property
    def error(self) -> float:
        """`|W_merged - W - D| / |D|`: relative error of the delta in the merged weights."""
        return math.sqrt(self.rr / self.dd) if self.dd else 0.0


def sums_of(before: Tensor, delta: Tensor, lost: Tensor) -> list[Tensor]:
    """Return `<W, W>`, `<D, D>`, `<R, D>` and `<R, R>` of each block of some rows.

    A sum in float32 is of one block: over 64 million values it is off by half a percent.
    """
    w, d, r = before.reshape(-1), delta.reshape(-1), lost.reshape(-1)
    step = _elements_at_once(w)
    if len(w) <= step:
        return [torch.dot(w, w), torch.dot(d, d), torch.dot(r, d), torch.dot(r, r)]
    blocks = zip(torch.split(w, step), torch.split(d, step), torch.split(r, step), strict=True)
    return [one for block in blocks for one in sums_of(*block)]


def fold_rows(
    rows: Tensor,
    start: int,
    delta: Delta,
    tally: Tally | None = None,
    out: Tensor | None = None,
    memory: Memory | None = None,
) -> Tensor:
    """Return rows `(n, cols)` from `start` on with the delta added in its dtype, rounded once.

    The result is written to `out`, possibly `rows` itself. A tally counts how much of the delta is
    left after rounding, which takes as long as the rest. Values outside every block of the delta
    keep their bits. `memory` gives what the arithmetic needs: who folds many blocks reuses it.
    """
    out = torch.empty_like(rows) if out is None else out
    if not len(rows):
        return out
    step = min(rows_at_once(rows), len(rows))
    sums: list[Tensor] = []
    with torch.inference_mode():  # autograd's bookkeeping would be a tenth of the arithmetic
        # Few calls for each block: the arithmetic fills the caches, so each call is a slow one, and
        # threads wait for the GIL at each.
        n = 1 if tally is None else 4
        shape = n * step, rows.shape[1]
        if memory is None:
            room = torch.empty(shape, dtype=delta.dtype, device=rows.device)
        else:
            room = memory(delta.dtype, *shape)
        room = room.view(n, step, -1)
        for piece, merged in zip(torch.split(rows, step), torch.split(out, step), strict=True):
            if len(piece) < step:
                room = room[:, : len(piece)]
            if tally is None:
                merged.copy_(delta.fold_(room[0].copy_(piece), start))
            else:
                before, change, wanted, written = room
                before.copy_(piece)
                if delta.gain is None:
                    torch.add(before, delta.over_(change, start), out=wanted)
                else:
                    torch.sub(delta.fold_(wanted.copy_(before), start), before, out=change)
                lost = wanted.sub_(written.copy_(merged.copy_(wanted)))
                sums += sums_of(before, change, lost)
            start += len(piece)
        if tally is not None:
            tally.take(sums, delta.dtype)
    return out


def with_tally(report: TensorReport, tally: Tally | None) -> TensorReport:
    """Return a report with what a tally says of rounding."""
    if tally is None or not tally.counted:
        return report
    relative = tally.delta_norm / tally.weight_norm if tally.weight_norm else math.inf
    figures = {"relative": relative, "kept": tally.kept, "error": tally.error}
    known = {key: v if math.isfinite(v) else None for key, v in figures.items()}
    return TensorReport(**{**report.__dict__, **known})
