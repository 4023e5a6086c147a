"""Rows of a merged weight that are rounded once, and what rounding has left of the delta.

A W in 16 bits is added to in float32. A tally counts in the same pass how much of the delta is left
after rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_inject.core.functional.factors import Patch
from lora_inject.core.functional.fold import Delta, rows_at_once
from lora_inject.core.functional.gain import Gain, norms_of
from lora_inject.core.functional.merge_report import TensorReport


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


class GainedDelta(Delta):
    """A delta with a gain on the outputs of `W + delta`."""

    def __init__(self, terms: Sequence[Patch], dtype: torch.dtype, gain: Gain) -> None:
        super().__init__(terms, dtype)
        self._gain = gain.to(dtype)
        self._by_columns = bool(terms) and terms[0].spec.transposed
        self._gains: Tensor | None = None

    def norms_of(self, blocks: Iterable[tuple[int, Tensor]]) -> None:
        """Compute the norms of outputs that are columns before `fold_`, since they need all rows.

        `blocks` are `(first row, rows)` of W. Outputs that are rows need no such pass.
        """
        if not self._by_columns:
            return
        squares: Tensor | None = None
        for start, rows in blocks:
            total = self.add_(rows.to(self.dtype, copy=True), start)
            mine = total.square().sum(dim=0, dtype=torch.float64)
            squares = mine if squares is None else squares + mine
        assert squares is not None
        self._gains = self._gain.of(squares.sqrt().to(self.dtype))

    def fold_(self, rows: Tensor, start: int) -> Tensor:
        """Add the delta to rows `(n, cols)` from `start` on and multiply by the gain, in place."""
        total = self.add_(rows, start)
        if self._gains is not None:
            return total.mul_(self._gains)
        return total.mul_(self._gain.of(norms_of(total, False), start)[:, None])


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
        w, d, r = before.reshape(-1), delta.reshape(-1), lost.reshape(-1)
        sums = torch.stack([torch.dot(w, w), torch.dot(d, d), torch.dot(r, d), torch.dot(r, r)])
        ww, dd, rd, rr = sums.tolist()
        mine = Tally(ww, dd, rd, rr, torch.finfo(w.dtype).eps)
        self.__dict__.update((self + mine).__dict__)

    def __add__(self, other: Tally) -> Tally:
        """Return the sum of two tallies of different rows of the same tensor."""
        ww, dd, rd, rr = (
            getattr(self, key) + getattr(other, key) for key in ("ww", "dd", "rd", "rr")
        )
        return Tally(ww, dd, rd, rr, max(self.eps, other.eps))

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


def fold_rows(
    rows: Tensor,
    start: int,
    delta: Delta,
    tally: Tally | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return rows `(n, cols)` from `start` on with the delta added in its dtype, rounded once.

    The result is written to `out`, possibly `rows` itself. A tally counts how much of the delta is
    left after rounding, which takes as long as the rest. Values outside every block of the delta
    keep their bits.
    """
    out = torch.empty_like(rows) if out is None else out
    fold = delta.fold_ if isinstance(delta, GainedDelta) else delta.add_
    step = min(rows_at_once(rows), rows.shape[0])
    with torch.inference_mode():  # autograd's bookkeeping would be a tenth of the arithmetic
        # Few torch calls for each block: threads wait for the GIL at each call.
        room = torch.empty(3, step, rows.shape[1], dtype=delta.dtype, device=rows.device)
        for first in range(0, rows.shape[0], max(1, step)):
            piece, merged = rows[first : first + step], out[first : first + step]
            before, change, wanted = room[:, : piece.shape[0]]
            before.copy_(piece)
            if tally is None:
                merged.copy_(fold(before, start + first))
                continue
            if isinstance(delta, GainedDelta):
                wanted = fold(before.clone(), start + first)
                merged.copy_(wanted)
                tally.count(before, wanted - before, wanted - merged.to(delta.dtype))
                continue
            # -0.0: adding it to any value keeps all bits.
            delta.add_(change.fill_(-0.0), start + first)
            merged.copy_(torch.add(before, change, out=wanted))
            tally.count(before, change, wanted.sub_(merged))
    return out


def with_tally(report: TensorReport, tally: Tally | None) -> TensorReport:
    """Return a report with what a tally says of rounding."""
    if tally is None or not tally.counted:
        return report
    relative = tally.delta_norm / tally.weight_norm if tally.weight_norm else math.inf
    figures = {"relative": relative, "kept": tally.kept, "error": tally.error}
    known = {key: v if math.isfinite(v) else None for key, v in figures.items()}
    return TensorReport(**{**report.__dict__, **known})
