"""Products of thin matrices: their size and their singular values, without forming them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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

    def dense(self) -> Tensor:
        """Form the matrix, `(out, in)` in float64: for tests and for small matrices."""
        return self.left @ self.right

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
