"""How much two sets of singular directions have in common: eq. (4) of the paper.

`phi(i, j) = |U1_i^T U2_j|_F^2 / min(i, j)` for all i and j is one product of the two sets
of directions, squared, and summed along both sides. It is 1 where the smaller span lies in the
larger, 0 where they are orthogonal, and `max(i, j) / d` on average for random spans in d
dimensions.
Source: arXiv:2106.09685, section 7.2 and appendix G.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lora_inject.analysis.thin import SiteBlock

Side = Literal["right", "left"]
"""`right`: directions in the input, of A. `left`: directions in the output, of B."""


def directions(matrix: Tensor, side: Side = "right") -> Tensor:
    """Return the singular directions of a matrix, the strongest first.

    Args:
        matrix: `(m, n)`, any floating dtype: A for `right`, B for `left`.
        side: Which singular vectors.

    Returns:
        `(n, k)` for `right`, `(m, k)` for `left`, float64, orthonormal columns. Directions whose
        singular value is zero to float64 say nothing and are left out, so k is the rank.

    Examples:
        >>> directions(torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 0.0]])).abs()
        tensor([[0.],
                [1.],
                [0.]], dtype=torch.float64)
    """
    U, S, Vh = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    noise = S[:1] * max(matrix.shape) * torch.finfo(S.dtype).eps
    n = int(S.gt(noise).sum())
    found: Tensor = Vh[:n].T if side == "right" else U[:, :n]
    return found


def block_directions(block: SiteBlock, side: Side = "right") -> Tensor:
    """Return the singular directions of A or B of a block, the strongest first.

    A and B of a site with a frozen start (pissa, olora) hold that start too: there
    the directions are those of the delta.

    Args:
        block: The block.
        side: `right` for A, `left` for B.

    Returns:
        `(in, k)` or `(out, k)`, orthonormal columns, float64.
    """
    if block.frozen_start:
        U, _, V = block.delta.svd()
        return V if side == "right" else U
    return directions(block.A if side == "right" else block.B, side)


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Compare two sets of orthonormal directions: phi for all i and j.

    Args:
        first: `(d, k1)`, orthonormal columns, the strongest first.
        second: `(d, k2)` likewise.

    Returns:
        `(k1, k2)` float64; the entry `[i - 1, j - 1]` is `phi(i, j)`, in [0, 1].
    """
    overlap = (first.T @ second).square().cumsum(0).cumsum(1)
    i, j = _counts(overlap.shape[0], overlap.shape[1], overlap.device)
    return (overlap / torch.minimum(i, j)).clamp(max=1.0)


def subspace_similarity(first: Tensor, second: Tensor, side: Side = "right") -> Tensor:
    """Compare the singular directions of two matrices: phi of eq. (4) for all i and j.

    Args:
        first: A of one adapter, `(r1, in)`, or B, `(out, r1)`, with `side="left"`.
        second: A or B of the other, over the same width; another rank, seed or site.
        side: `right` singular vectors (of A, as in the paper's figures), or `left` ones (of B).

    Returns:
        `(k1, k2)` float64; the entry `[i - 1, j - 1]` is `phi(first, second, i, j)`. k1 and k2 are
        the ranks of the matrices, r unless rows are dependent: a B of zeros gives `(0, k2)`.

    Examples:
        >>> A = torch.randn(3, 20)
        >>> mixed = torch.randn(3, 3) @ A  # spans the same space
        >>> phi = subspace_similarity(A, mixed)
        >>> phi.shape, round(float(phi[-1, -1]), 6)
        (torch.Size([3, 3]), 1.0)
    """
    return similarity(directions(first, side), directions(second, side))


def expected_similarity(rank1: int, rank2: int, dim: int) -> Tensor:
    """Return the mean of phi over random subspaces: `max(i, j) / d`.

    For independent uniform spans the mean of `|U1^T U2|_F^2` is `i j / d`: it is the sum of i times
    j squares, each of one coordinate of a random unit vector. The singular directions of a Gaussian
    matrix are uniform, so this is the baseline of figures 4 and 7.

    Args:
        rank1: Rows of the grid.
        rank2: Columns.
        dim: d, the width that the spans live in.

    Returns:
        `(rank1, rank2)` float64.

    Examples:
        >>> expected_similarity(2, 3, 12)
        tensor([[0.0833, 0.1667, 0.2500],
                [0.1667, 0.1667, 0.2500]], dtype=torch.float64)
    """
    i, j = _counts(rank1, rank2)
    return torch.maximum(i, j) / dim


def deviation_of_similarity(rank1: int, rank2: int, dim: int) -> Tensor:
    """Return the standard deviation of phi over random subspaces.

    `Var |U1^T U2|_F^2 = 2 i j (d - i)(d - j) / (d^2 (d - 1)(d + 2))` for independent uniform spans,
    which follows from the fourth moments of an orthogonal matrix drawn from the Haar measure.

    Args:
        rank1: Rows of the grid.
        rank2: Columns.
        dim: d, at least 2.

    Returns:
        `(rank1, rank2)` float64.
    """
    i, j = _counts(rank1, rank2)
    variance = 2 * i * j * (dim - i) * (dim - j) / (dim**2 * (dim - 1) * (dim + 2))
    return variance.clamp(min=0).sqrt() / torch.minimum(i, j)


def gaussian_similarity(rank1: int, rank2: int, dim: int, seed: int = 0) -> Tensor:
    """Compare two random Gaussian matrices: one draw of the paper's baseline.

    Args:
        rank1: Rows of the first.
        rank2: Rows of the second.
        dim: Their columns.
        seed: Of both.

    Returns:
        `(rank1, rank2)` float64.

    Examples:
        >>> float(gaussian_similarity(8, 8, 4000)[-1, -1]) < 0.01
        True
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        torch.randn(rank, dim, generator=generator, dtype=torch.float64) for rank in (rank1, rank2)
    )
    return subspace_similarity(first, second)


def _counts(rows: int, columns: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return i as a column and j as a row, counted from 1."""
    i = torch.arange(1, rows + 1, dtype=torch.float64, device=device)[:, None]
    j = torch.arange(1, columns + 1, dtype=torch.float64, device=device)[None]
    return i, j
