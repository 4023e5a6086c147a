"""Truncated SVDs: of a matrix, and of a product of thin matrices that is never formed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SPARE = 16
"""Directions computed besides those that are kept (Halko et al., arXiv:0909.4061, section 4.2)."""
POWER_STEPS = 8
"""On pure noise `_leading` then finds the energy of 12 directions within 2 %."""


@dataclass(frozen=True)
class Decomposed:
    """`U diag(S) V^T`, an approximation of some rank.

    Attributes:
        U: `(rows, rank)`.
        S: `(rank,)`, decreasing.
        V: `(cols, rank)`.
        total: Sum of the squares of all elements of the matrix.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    total: float

    @property
    def energy(self) -> float:
        """Share of `total` that the approximation holds."""
        return float(self.S.double().square().sum()) / self.total if self.total else 1.0

    def cut(self, rank: int, energy: float | None = None) -> Decomposed:
        """Keep the largest `rank` values, and no more than `energy` takes."""
        if energy is not None and self.total:
            held = self.S.double().square().cumsum(0) / self.total
            enough = (held >= energy - 1e-9).nonzero()
            rank = min(rank, int(enough[0]) + 1 if len(enough) else rank)
        return Decomposed(self.U[:, :rank], self.S[:rank], self.V[:, :rank], self.total)


def decompose(matrix: Tensor, rank: int | None, energy: float | None = None) -> Decomposed:
    """Decompose a matrix, to a rank or to a share of its energy.

    `matrix` is `(rows, cols)`, float32 or float64; `rank` is the most to keep, and of it no more
    than what holds `energy`, a share of the sum of squares in (0, 1]. The result is the same at
    every call, and exact where the rank is not small compared with the matrix.

    Examples:
        >>> D = torch.outer(torch.arange(4.0), torch.arange(3.0))
        >>> decomposed = decompose(D, rank=2, energy=0.999)
        >>> decomposed.S.shape, round(decomposed.energy, 6)
        (torch.Size([1]), 1.0)
    """
    limit = min(matrix.shape)
    most = limit if rank is None else min(rank, limit)
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    tried = most if energy is None else min(most, SPARE)
    while 4 * (tried + SPARE) < limit:
        U, S, V = _leading(matrix, tried + SPARE)
        decomposed = Decomposed(U, S, V, total).cut(tried, energy)
        if energy is None or tried == most or decomposed.energy >= energy - 1e-9:
            return decomposed
        tried = min(most, 2 * tried)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return Decomposed(U, S, Vh.T, total).cut(most, energy)


def _leading(matrix: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V of about the n leading directions, as `torch.svd_lowrank`, from one seed.

    torch's draws from the generators of the process, and `manual_seed` seeds those of all devices.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    generator = torch.Generator(matrix.device).manual_seed(0)
    start = torch.empty(tall.shape[1], n, dtype=matrix.dtype, device=matrix.device)
    start.normal_(generator=generator)
    Q = torch.linalg.qr(tall @ start).Q
    for _ in range(POWER_STEPS):
        Q = torch.linalg.qr(tall @ torch.linalg.qr(tall.mT @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ tall, full_matrices=False)
    return (Q @ U, S, Vh.mT) if tall is matrix else (Vh.mT, S, Q @ U)


def inner(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> float:
    """Return `<L1 R1, L2 R2>`, the sum over all elements, by products of k1 by k2.

    Factors are `(..., out, k)` and `(..., k, in)`, with the same leading dimensions in both.

    Examples:
        >>> L, R = torch.ones(6, 1), torch.ones(1, 4)
        >>> inner((L, R), (L, 2 * R))
        48.0
    """
    return float(((one[0].mT @ two[0]) * (one[1] @ two[1].mT)).sum())


def thin_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose `left @ right`, `(..., out, k)` by `(..., k, in)`, from the thin factors.

    With `left = Q_l R_l` and `right^T = Q_r R_r` only the SVD of `R_l R_r^T`, k by k, remains.
    Returns U `(..., out, n)`, S `(..., n)`, decreasing, and V `(..., in, n)`, n at most k; singular
    values within rounding of zero are zero.
    """
    Q_l, R_l = torch.linalg.qr(left)
    Q_r, R_r = torch.linalg.qr(right.mT)
    U, S, Vh = torch.linalg.svd(R_l @ R_r.mT, full_matrices=False)
    # Rounding is relative to the factors: where a frozen start cancels, 1e-16 of them remains.
    size = torch.linalg.matrix_norm(R_l, 2) * torch.linalg.matrix_norm(R_r, 2)
    noise = size * max(left.shape[-2], right.shape[-1]) * torch.finfo(S.dtype).eps
    S = S.where(noise.unsqueeze(-1) < S, torch.zeros_like(S))
    return Q_l @ U, S, Q_r @ Vh.mT


@dataclass(frozen=True)
class ThinProduct:
    """A matrix `left @ right` that is never formed.

    Attributes:
        left: `(out, k)`, float64.
        right: `(k, in)`, float64.

    Examples:
        >>> D = ThinProduct(torch.ones(6, 1).double(), 2 * torch.ones(1, 4).double())
        >>> U, S, V = D.svd()
        >>> U.shape, round(float(S), 6), V.shape
        (torch.Size([6, 1]), 9.797959, torch.Size([4, 1]))
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, A: Tensor, B: Tensor, scale: float = 1.0) -> ThinProduct:
        """Take `scale * B @ A`, with A `(rank, in)` and B `(out, rank)` of any floating dtype."""
        return cls(scale * B.detach().double(), A.detach().double())

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.left.shape[0], self.right.shape[1]

    def square(self) -> float:
        """Return the sum of squares, by products of k by k; NaN where a value is not finite."""
        square = inner((self.left, self.right), (self.left, self.right))
        # -1e-17 where a frozen start cancels
        return square if math.isnan(square) else max(square, 0.0)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Decompose it from the thin factors.

        Returns:
            U `(out, n)`, S `(n,)` decreasing, V `(in, n)`, float64, with n the number of
            singular values above rounding, at most k.
        """
        U, S, V = thin_svd(self.left, self.right)
        n = int(S.count_nonzero())
        return U[:, :n], S[:n], V[:, :n]
