"""Folding: the delta added to rows of W in float32, and rounded once.

Rows of a weight matrix can be merged one block of rows at a time, so that the float32
copies stay in the cache of a core and no tensor is ever held twice. What rounding to 16 bits leaves
of the delta is counted on the way, while the block is at hand.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from lora_inject.functional.scripted import scripted
from lora_inject.spec.sites import SiteSpec
from lora_inject.storage.tensors import in_memory

# Elements of a block: the float32 room for three and the rows themselves take 1 MiB, which fits
# the cache of one core.
BLOCK_ELEMENTS = 9 << 13


def block_rows(matrix: Tensor) -> int:
    """Return how many rows of a matrix to fold at once.

    Each thread of a CPU gets a block's worth; an accelerator gets enough to keep it busy.
    """
    n_elements = BLOCK_ELEMENTS * torch.get_num_threads()
    if matrix.device.type != "cpu":
        n_elements = BLOCK_ELEMENTS << 8
    return max(1, n_elements // max(1, matrix.shape[1]))


def all_finite(t: Tensor) -> bool:
    """Whether a tensor holds no NaN and no Inf.

    A sum tells so in most cases, in a fifth of the time.

    Examples:
        >>> all_finite(torch.ones(2)), all_finite(torch.tensor([1.0, torch.nan]))
        (True, False)
    """
    quick = t.is_floating_point() and t.element_size() > 1  # float8 has no sum
    return (quick and math.isfinite(float(t.detach().sum()))) or bool(torch.isfinite(t).all())


def mix_copies(
    rows: Tensor, copies: Sequence[tuple[Tensor, float]], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return `W + sum of w (T - W)` over trained copies T of a tensor W, each with its weight w.

    Args:
        rows: W, or some rows of it.
        copies: `(T, w)`, each T of the same shape as `rows`.
        dtype: Dtype of the arithmetic and of the result.

    Returns:
        A new tensor: exactly T for one copy of weight 1.

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


class _Part(NamedTuple):
    """`left @ right`, added to rows `first` to `last` and some columns of a weight matrix."""

    first: int
    last: int
    cols: slice
    left: Tensor
    right: Tensor


class Delta:
    """What several terms add to one weight matrix: prepared once, asked for block by block.

    Args:
        terms: The updates.
        dtype: Dtype of the arithmetic.

    Examples:
        >>> spec = SiteSpec("q", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> A, B = torch.randn(2, 4), torch.randn(6, 2)
        >>> rows = Delta([Term(spec, A, B)]).add_(torch.zeros(3, 4), start=1)
        >>> torch.allclose(rows, 2.0 * (B @ A)[1:4], atol=1e-6)
        True
    """

    def __init__(self, terms: Sequence[Term], dtype: torch.dtype = torch.float32) -> None:
        parts = [part for term in terms for part in _parts(term, dtype)]
        self._parts = sorted(parts, key=lambda part: part.first)
        self._firsts = [part.first for part in self._parts]
        self._lasts = list(accumulate((part.last for part in self._parts), max))

    def _on(self, start: int, stop: int) -> list[_Part]:
        """Return the parts that may reach rows `start` to `stop`."""
        if len(self._parts) == 1:
            return self._parts
        return self._parts[bisect_right(self._lasts, start) : bisect_left(self._firsts, stop)]

    def add_(self, rows: Tensor, start: int) -> Tensor:
        """Add the delta to some rows, in place.

        Args:
            rows: `(n, cols)`: rows `start` to `start + n` of the weight matrix.
            start: Index of the first row.

        Returns:
            `rows`. Values outside every block keep their bits.
        """
        for part in self._on(start, start + rows.shape[0]):
            first, last = max(part.first, start), min(part.last, start + rows.shape[0])
            if first < last:
                left = part.left[first - part.first : last - part.first]
                rows[first - start : last - start, part.cols].addmm_(left, part.right)
        return rows

    def on(self, start: int, stop: int) -> tuple[list[Tensor], list[Tensor], list[list[int]]]:
        """Return what reaches rows `start` to `stop`, as plain lists.

        Returns:
            The left factors, the right factors, and `[first row, last, first column, last]` of
            where each product goes.
        """
        found = self._on(start, stop)
        places = [[p.first, p.last, p.cols.start, p.cols.stop] for p in found]
        return [p.left for p in found], [p.right for p in found], places


def _parts(term: Term, dtype: torch.dtype) -> list[_Part]:
    """Return the blocks of a term, with the scale in B and everything in its dtype."""
    spec = term.spec
    A = in_memory(term.A.detach()).reshape(-1, spec.in_features).to(dtype)
    B = in_memory(term.B.detach()).reshape(-1, spec.rank).to(dtype) * (spec.scale * term.weight)
    parts = []
    for block in spec.blocks:
        a, b = A[slice(*block.a)], B[slice(*block.b)]
        left, right = (a.t(), b.t()) if spec.transposed else (b, a)
        parts.append(_Part(*block.rows, slice(*block.cols), left, right))
    return parts


@dataclass
class Tally:
    """Running sums over the row blocks of one tensor: what rounding left of the delta D.

    Attributes:
        finite: Whether every merged value is finite.
        counted: Whether any delta was.
    """

    finite: bool = True
    counted: bool = False
    _dd: float = field(default=0.0, repr=False)
    _ww: float = field(default=0.0, repr=False)
    _rd: float = field(default=0.0, repr=False)
    _rr: float = field(default=0.0, repr=False)
    _eps: float = field(default=0.0, repr=False)

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
        lost = torch.sub(delta, effect, out=effect)
        flat = before.reshape(-1)
        both = torch.stack([lost.reshape(-1), delta.reshape(-1)])
        (rr, rd), (_, dd) = torch.mm(both, both.t()).tolist()
        self.count_sums([torch.dot(flat, flat).item(), rr, rd, dd], flat.dtype)

    def count_sums(self, sums: Sequence[float], dtype: torch.dtype) -> None:
        """Count some rows by their sums.

        Args:
            sums: Of `W * W`, `R * R`, `R * D` and `D * D`, with `R = W + D - W_merged`.
            dtype: What they were computed in.
        """
        ww, rr, rd, dd = sums
        self._ww += ww
        self._rr += rr
        self._rd += rd
        self._dd += dd
        self._eps = torch.finfo(dtype).eps
        self.counted = True
        self.finite = self.finite and math.isfinite(rr)

    def __add__(self, other: Tally) -> Tally:
        """Return what was counted in either: other rows of the same tensor."""
        return Tally(
            self.finite and other.finite,
            self.counted or other.counted,
            self._dd + other._dd,
            self._ww + other._ww,
            self._rd + other._rd,
            self._rr + other._rr,
            max(self._eps, other._eps),
        )

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
        if not self._dd:
            return 1.0
        effect = self._dd - self._rd
        # W + D is itself rounded, to float32: less than that is nothing.
        noise = self._eps / 2 * math.sqrt(self._ww * self._dd)
        return effect / self._dd if not abs(effect) <= noise else 0.0

    @property
    def error(self) -> float:
        """`|W_merged - W - D| / |D|`: relative error of the delta that the weights really got."""
        return math.sqrt(self._rr / self._dd) if self._dd else 0.0


class Scratch:
    """Memory that a pass over many blocks of rows uses again, so that it allocates nothing.

    What it gives out in inference mode can be written to in inference mode only.
    """

    def __init__(self) -> None:
        self._rooms: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def room(self, n_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return uninitialized memory for three blocks, `(3, n_elements)`, the same each time."""
        room = self._rooms.get((dtype, device))
        if room is None or room.numel() < 3 * n_elements:
            room = torch.empty(3 * n_elements, dtype=dtype, device=device)
            self._rooms[dtype, device] = room
        return room[: 3 * n_elements].view(3, n_elements)


def fold_rows(
    rows: Tensor,
    start: int,
    terms: Sequence[Term] | Delta,
    dtype: torch.dtype | None = None,
    tally: Tally | None = None,
    scratch: Scratch | None = None,
    out: Tensor | None = None,
    piece_rows: int | None = None,
) -> Tensor:
    """Return some rows of the weight matrix with all terms added, rounded once.

    Args:
        rows: `(n, cols)`: rows `start` to `start + n` of the weight matrix; modified only where
            they are `out`.
        start: Index of the first row.
        terms: The updates, as a `Delta` in the accumulation dtype where many blocks share it.
        dtype: Dtype of the result; that of `rows` by default.
        tally: Counts what rounding left, where given.
        scratch: Buffers to use again; new ones by default.
        out: Where the result goes, possibly `rows` itself; a new tensor by default.
        piece_rows: How many rows to compute on at a time; all by default. Sums are counted piece
            by piece.

    Returns:
        `(n, cols)`. Accumulated in float32, or in float64 for a float64 weight. Values outside
        every block come back with the same bits.
    """
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    scratch = scratch or Scratch()
    delta = terms if isinstance(terms, Delta) else Delta(terms, wide)
    if out is None:
        out = torch.empty(rows.shape, dtype=dtype or rows.dtype, device=rows.device)
    n_rows, n_cols = rows.shape
    step = max(1, min(piece_rows or n_rows, n_rows))
    lefts, rights, places = delta.on(start, start + n_rows)
    with torch.inference_mode():  # autograd's bookkeeping would be a tenth of the arithmetic
        room = scratch.room(step * n_cols, wide, rows.device)
        sums = _fold_pieces(rows, out, start, lefts, rights, places, room, step, tally is not None)
    if tally is not None:
        tally.count_sums(sums, wide)
    return out


@scripted
def _fold_pieces(
    rows: Tensor,
    out: Tensor,
    start: int,
    lefts: list[Tensor],
    rights: list[Tensor],
    places: list[list[int]],
    room: Tensor,
    step: int,
    count: bool,
) -> list[float]:
    """Fold `step` rows at a time; returns the sums of `W * W`, `R * R`, `R * D` and `D * D`.

    TorchScript: no calls of our own, no other types.
    """
    n_rows, n_cols = rows.shape[0], rows.shape[1]
    n_pieces = (n_rows + step - 1) // step
    weights = torch.zeros(n_pieces, dtype=room.dtype, device=room.device)
    losses = torch.zeros(n_pieces, 2, 2, dtype=room.dtype, device=room.device)
    # Views in lists, made at once, are fewer calls at each turn.
    piece_weights, piece_losses = weights.unbind(), losses.unbind()
    pieces, merged_pieces = torch.split(rows, step), torch.split(out, step)
    total, change, stored = room.view(3, step, n_cols).unbind()
    both = room[:2]
    flat, turned = both[0], both.t()
    for k in range(n_pieces):
        piece = pieces[k]
        n = piece.shape[0]
        if n < step:
            total, change, stored = total[:n], change[:n], stored[:n]
            both = room[:2, : n * n_cols]
            flat, turned = both[0], both.t()
        first = start + k * step
        last = first + n
        total.copy_(piece)
        whole = len(places) == 1 and places[0][0] <= first and last <= places[0][1]
        if whole and places[0][2] == 0 and places[0][3] == n_cols:
            left = lefts[0][first - places[0][0] : last - places[0][0]]
            torch.mm(left, rights[0], out=change)
        else:
            change.zero_().neg_()  # -0.0, which added to any value leaves all of its bits
            for i in range(len(places)):
                begin, end = max(places[i][0], first), min(places[i][1], last)
                if begin < end:
                    left = lefts[i][begin - places[i][0] : end - places[i][0]]
                    part = change[begin - first : end - first, places[i][2] : places[i][3]]
                    part.addmm_(left, rights[i])
        if count:
            torch.dot(flat, flat, out=piece_weights[k])
        total.add_(change)
        merged = merged_pieces[k].copy_(total)
        if count:
            total.sub_(stored.copy_(merged))
            torch.mm(both, turned, out=piece_losses[k])
    sums = losses.sum(dim=0, dtype=torch.float64)
    ww = weights.sum(dtype=torch.float64)
    return [float(ww), float(sums[0, 0]), float(sums[0, 1]), float(sums[1, 1])]


def fold_rows_(rows: Tensor, start: int, terms: Sequence[Term] | Delta) -> None:
    """Add all terms to some rows of a float32 or float64 weight matrix, in place.

    Args:
        rows: `(n, cols)`: rows `start` to `start + n` of the weight matrix.
        start: Index of the first row.
        terms: The updates, as a `Delta` in the dtype of `rows` where many blocks share it.
    """
    delta = terms if isinstance(terms, Delta) else Delta(terms, rows.dtype)
    delta.add_(rows, start)
