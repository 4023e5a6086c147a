"""Truncated SVD of a matrix that is only ever seen in row blocks.

A randomised range finder needs nothing of a matrix but products with thin ones, and those
can be summed over row blocks. So the memory is that of the factors, however large the matrix, and
each product reads the matrix once. Small matrices are decomposed exactly.
Source: Halko, Martinsson, Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Blocks = Callable[[], Iterator[tuple[int, Tensor]]]
"""Gives `(first row, rows)` over a whole matrix, float32, anew at every call."""

EXACT_ELEMENTS = 1 << 22
"""Matrices of no more elements are decomposed exactly."""
OVERSAMPLE = 16
POWER_STEPS = 2


@dataclass(frozen=True)
class Decomposed:
    """`U diag(S) V^T`, the best approximation of some rank that was found.

    Attributes:
        U: `(rows, rank)`.
        S: `(rank,)`, decreasing.
        V: `(cols, rank)`.
        total: Sum of the squares of all elements of the matrix.
        exact: Whether it is the best there is.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    total: float
    exact: bool

    @property
    def energy(self) -> float:
        """Share of `total` that the approximation holds."""
        return float(self.S.double().square().sum()) / self.total if self.total else 1.0

    def cut(self, rank: int) -> Decomposed:
        """Keep the largest `rank` values."""
        return Decomposed(self.U[:, :rank], self.S[:rank], self.V[:, :rank], self.total, self.exact)


def decompose(
    blocks: Blocks, shape: tuple[int, int], rank: int | None, energy: float | None, seed: int = 0
) -> Decomposed:
    """Decompose a matrix, to a rank or to a share of its energy.

    Args:
        blocks: The matrix.
        shape: Its shape.
        rank: Rank to keep at most, or None.
        energy: Smallest share of the sum of squares to keep, in (0, 1], or None.
        seed: Of the random directions.

    Returns:
        The decomposition; of the smallest rank that holds `energy` where that was asked.

    Example:
        >>> D = torch.outer(torch.arange(4.0), torch.arange(3.0))
        >>> found = decompose(lambda: iter([(0, D)]), (4, 3), rank=2, energy=0.999)
        >>> found.S.shape, round(found.energy, 6)
        (torch.Size([1]), 1.0)
    """
    limit = min(shape)
    most = limit if rank is None else min(rank, limit)
    if shape[0] * shape[1] <= EXACT_ELEMENTS:
        return _cut_to(_exactly(blocks, shape), most, energy)
    total = sum(float(rows.double().square().sum()) for _, rows in blocks())
    tried = most if energy is None else min(most, 16)
    while True:
        found = _at_random(blocks, shape, min(limit, tried + OVERSAMPLE), total, seed)
        if energy is None or found.cut(tried).energy >= energy or tried >= most:
            return _cut_to(found, most if energy is None else min(most, tried), energy)
        tried = min(most, 2 * tried)


def _exactly(blocks: Blocks, shape: tuple[int, int]) -> Decomposed:
    matrix = torch.empty(shape)
    for start, rows in blocks():
        matrix[start : start + rows.shape[0]] = rows
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    total = float(matrix.double().square().sum())
    return Decomposed(U.float(), S.float(), Vh.T.float(), total, exact=True)


def _at_random(
    blocks: Blocks, shape: tuple[int, int], width: int, total: float, seed: int
) -> Decomposed:
    generator = torch.Generator().manual_seed(seed)
    Q = _times(blocks, shape, torch.randn(shape[1], width, generator=generator))
    for _ in range(POWER_STEPS):
        Z = torch.linalg.qr(_transposed_times(blocks, shape, torch.linalg.qr(Q).Q)).Q
        Q = _times(blocks, shape, Z)
    Q = torch.linalg.qr(Q).Q
    small = _transposed_times(blocks, shape, Q)  # (cols, width) = D^T Q
    V, S, Wh = torch.linalg.svd(small, full_matrices=False)
    return Decomposed(Q @ Wh.T, S, V, total, exact=False)


def _times(blocks: Blocks, shape: tuple[int, int], thin: Tensor) -> Tensor:
    """Return `D @ thin`."""
    out = torch.empty(shape[0], thin.shape[1])
    for start, rows in blocks():
        torch.mm(rows, thin, out=out[start : start + rows.shape[0]])
    return out


def _transposed_times(blocks: Blocks, shape: tuple[int, int], thin: Tensor) -> Tensor:
    """Return `D^T @ thin`."""
    out = torch.zeros(shape[1], thin.shape[1])
    for start, rows in blocks():
        out.addmm_(rows.T, thin[start : start + rows.shape[0]])
    return out


def _cut_to(found: Decomposed, most: int, energy: float | None) -> Decomposed:
    """Keep at most `most` values, and no more than `energy` takes."""
    if energy is None or not found.total:
        return found.cut(most)
    held = found.S.double().square().cumsum(0) / found.total
    enough = (held >= energy - 1e-9).nonzero()
    return found.cut(min(most, int(enough[0]) + 1 if len(enough) else most))
