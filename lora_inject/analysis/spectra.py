"""The singular values of a delta, and how many of them it really needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_inject.adapter.svd import ThinProduct
from lora_inject.analysis.blocks import Figures

SHARES = (0.90, 0.95, 0.99)
"""Shares of the energy for which the needed rank is stated."""


@dataclass(frozen=True)
class Spectrum(Figures):
    """Singular values of one delta.

    Attributes:
        values: `(n,)` float64, decreasing, with n the smallest of rank, out and in; values that
            are zero to float64 are zero.

    Examples:
        >>> s = Spectrum(torch.tensor([3.0, 1.0, 0.0]).double())
        >>> s.rank, round(s.stable_rank, 4), round(s.effective_rank, 4), s.rank_for(0.95)
        (2, 1.1111, 1.7548, 2)
    """

    values: Tensor

    @property
    def norm(self) -> float:
        """Frobenius norm of the delta."""
        return float(torch.linalg.vector_norm(self.values))

    @property
    def rank(self) -> int:
        """How many values are not zero."""
        return int(self.values.count_nonzero())

    @property
    def first_share(self) -> float:
        """Share of the energy in the first direction; 0 for no delta."""
        return float(self.energy[0]) if self.rank else 0.0

    @property
    def stable_rank(self) -> float:
        """`|D|_F^2 / |D|_2^2`: from 1 (one direction) to the rank (all equal); 0 for no delta."""
        return float(self._shares.sum() / self._shares[0]) if self.rank else 0.0

    @property
    def effective_rank(self) -> float:
        """`exp(H)`, H the entropy of `s / sum(s)`; 0 for no delta.

        Source: Roy and Vetterli, *The effective rank*, EUSIPCO 2007, definition 1.
        """
        if not self.rank:
            return 0.0
        p = self.values[: self.rank] / self.values.sum()
        return math.exp(float(-(p * p.log()).sum()))

    @property
    def energy(self) -> Tensor:
        """`(n,)`: share of the sum of squares that the first 1, 2, ... values hold."""
        return self._shares.cumsum(0)

    @property
    def needed(self) -> dict[str, int]:
        """The smallest rank that holds each share of `SHARES`."""
        return {f"{share:.0%}": self.rank_for(share) for share in SHARES}

    def rank_for(self, share: float) -> int:
        """Return the smallest rank that holds a share, in [0, 1], of the energy; 0 for no delta."""
        # Sums of float64 shares reach 1 only to a few units in the last place.
        enough = (self.energy >= share - 1e-12).nonzero()
        return int(enough[0]) + 1 if self.rank and len(enough) else 0

    @property
    def _shares(self) -> Tensor:
        # Divided first: squares of 1e-200 would vanish.
        first = float(self.values[0]) if self.rank else 1.0
        squares = (self.values / first).square()
        return squares / max(float(squares.sum()), 1.0)


def spectrum(delta: ThinProduct) -> Spectrum:
    """Return the singular values of a delta without forming it.

    Args:
        delta: Of a block, or `ThinProduct.of(A, B, scale)`.

    Returns:
        The spectrum, in float64.

    Examples:
        >>> A, B = torch.randn(2, 50), torch.randn(40, 2)
        >>> dense = torch.linalg.svdvals(3.0 * B.double() @ A.double())[:2]
        >>> torch.allclose(spectrum(ThinProduct.of(A, B, 3.0)).values, dense)
        True
    """
    _, S, _ = delta.svd()
    values = torch.zeros(min(*delta.shape, delta.left.shape[1]), dtype=S.dtype, device=S.device)
    values[: len(S)] = S
    return Spectrum(values)
