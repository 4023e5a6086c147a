"""The delta of a site as thin factors: one low-rank product for each block.

Whatever a site is, its delta is a few products `left @ right` of `(out, k)` and `(k,
in)`. Everything that can be said of a delta can be said of its thin factors, so no matrix of the
size of W is formed. The frozen start of pissa and olora is `k` more columns with the opposite sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_inject.adapter.state import SiteState
from lora_inject.errors import StateError
from lora_inject.functional import Term
from lora_inject.spec.sites import Block, SiteSpec


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
        """Take `scale * B @ A`.

        Args:
            A: `(rank, in)`, any floating dtype.
            B: `(out, rank)`.
            scale: Factor on the product.
        """
        return cls(scale * B.detach().double(), A.detach().double())

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.left.shape[0], self.right.shape[1]

    def dense(self) -> Tensor:
        """Form the matrix, `(out, in)` in float64: for tests and for small matrices."""
        return self.left @ self.right

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Decompose it by way of the thin factors.

        `left = Q_l R_l` and `right^T = Q_r R_r` leave the SVD of `R_l R_r^T`, of k by k.

        Returns:
            U `(out, n)`, S `(n,)` decreasing, V `(in, n)`, float64, with n the number of values
            that are not zero to float64, at most k.
        """
        left, right = torch.linalg.qr(self.left), torch.linalg.qr(self.right.T)
        U, S, Vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
        # Rounding is relative to the factors: a frozen start that cancels leaves 1e-16 of them.
        size = float(torch.linalg.matrix_norm(left.R, 2) * torch.linalg.matrix_norm(right.R, 2))
        noise = size * max(self.shape) * torch.finfo(S.dtype).eps
        n = int(S.gt(noise).sum())
        return left.Q @ U[:, :n], S[:n], right.Q @ Vh[:n].T


@dataclass(frozen=True)
class SiteBlock:
    """One low-rank block of a site: an adapted slice, an expert, or all of a plain site.

    Attributes:
        label: Name of the slice (`q`), `expert 3`, `expert 3 q`, or empty for a plain site.
        block: Where it lies on the weight matrix.
        transposed: Whether that matrix is `(in, out)`.
        A: `(rank, in)`, as stored.
        B: `(out, rank)`, as stored.
        delta: `scale * B @ A`, less the frozen start.
        frozen_start: Whether there is one (pissa, olora).
    """

    label: str
    block: Block
    transposed: bool
    A: Tensor
    B: Tensor
    delta: ThinProduct
    frozen_start: bool

    @property
    def rank(self) -> int:
        """r, the rows of A."""
        return self.A.shape[0]


def site_blocks(site: SiteState) -> tuple[SiteBlock, ...]:
    """Take a site apart into its low-rank blocks, in the order of `SiteSpec.blocks`.

    Args:
        site: The site.

    Returns:
        One block for each adapted slice of each expert.

    Raises:
        StateError: A tensor holds NaN or Inf, of which nothing can be said.

    Examples:
        >>> from lora_inject.spec.sites import Slices
        >>> spec = SiteSpec("qkv", "linear", 4, 6, (6, 4), rank=2, alpha=2,
        ...                 slices=Slices((("q", 2), ("k", 2), ("v", 2)), ("q", "v")))
        >>> [b.label for b in site_blocks(SiteState(spec, torch.ones(4, 4), torch.ones(4, 2)))]
        ['q', 'v']
    """
    return blocks_of_terms([Term(site.spec, A, B, sign) for A, B, sign in site.pairs])


def blocks_of_terms(terms: Sequence[Term]) -> tuple[SiteBlock, ...]:
    """Take the terms of one weight apart into blocks; the first is the update, others add to it.

    Args:
        terms: Terms of the same spec: the update, and less its frozen start where there is one.

    Raises:
        StateError: A tensor holds NaN or Inf.
    """
    spec = terms[0].spec
    flat = [(_flat(t.A, spec, spec.in_features), _flat(t.B, spec, spec.rank), t) for t in terms]
    found = []
    for block, label in zip(spec.blocks, _labels(spec), strict=True):
        parts = [(a[slice(*block.a)], b[slice(*block.b)], t) for a, b, t in flat]
        left = [spec.scale * t.weight * b.double() for _, b, t in parts]
        delta = ThinProduct(torch.cat(left, 1), torch.cat([a.double() for a, _, _ in parts]))
        A, B, _ = parts[0]
        found.append(SiteBlock(label, block, spec.transposed, A, B, delta, len(terms) > 1))
    return tuple(found)


def _labels(spec: SiteSpec) -> list[str]:
    slices = spec.slices.adapt if spec.slices else ("",)
    experts = [""] if spec.experts is None else [f"expert {e}" for e in range(spec.experts)]
    return [f"{expert} {part}".strip() for expert in experts for part in slices]


def _flat(tensor: Tensor, spec: SiteSpec, width: int) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise StateError(
            f"analyze '{spec.name}'",
            "its A or B holds NaN or Inf",
            "Its training diverged; take an earlier checkpoint of the adapter",
        )
    return tensor.detach().reshape(-1, width)
