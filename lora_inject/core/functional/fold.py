"""Add the delta to rows of W, one block at a time, which stays in the cache of a core.

`rounded_fold` has what a W in 16 bits, a trained copy or a gain needs besides.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from lora_inject.core.functional.factors import Patch

# Elements of a block: what is computed on them stays in a core's cache from one step to the next. A
# merge takes a third longer with blocks of a quarter.
BLOCK_ELEMENTS = 1 << 17


def rows_at_once(matrix: Tensor) -> int:
    """Return how many rows to fold at once: a block for each thread of a CPU, 256 on a device."""
    n_blocks = torch.get_num_threads() if matrix.device.type == "cpu" else 256
    return max(1, n_blocks * BLOCK_ELEMENTS // max(1, matrix.shape[1]))


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

    Examples:
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> spec = SiteSpec("q", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> A, B = torch.randn(2, 4), torch.randn(6, 2)
        >>> rows = Delta([Patch(spec, A, B)]).add_(torch.zeros(3, 4), start=1)
        >>> torch.allclose(rows, 2.0 * (B @ A)[1:4], atol=1e-6)
        True
    """

    def __init__(self, terms: Sequence[Patch], dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        parts = [part for term in terms for part in _parts(term, dtype)]
        self._parts = sorted(parts, key=lambda part: part.first)
        self._firsts = [part.first for part in self._parts]
        self._lasts = list(accumulate((part.last for part in self._parts), max))

    def add_(self, rows: Tensor, start: int) -> Tensor:
        """Add the delta to rows `(n, cols)` from `start` on, in place.

        Values outside every block keep their bits.
        """
        stop = start + rows.shape[0]
        reaching = slice(bisect_right(self._lasts, start), bisect_left(self._firsts, stop))
        for part in self._parts[reaching]:
            first, last = max(part.first, start), min(part.last, stop)
            if first < last:
                left = part.left[first - part.first : last - part.first]
                rows[first - start : last - start, part.cols].addmm_(left, part.right)
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
