"""How much two sets of singular directions have in common: eq. (4) of the paper.

`phi(i, j) = |U1_i^T U2_j|_F^2 / min(i, j)` for all i and j is one product of the two sets
of directions, squared, and summed along both sides. It is 1 where the smaller span lies in the
larger, 0 where they are orthogonal, and `max(i, j) / d` on average for random spans in d
dimensions: the mean of `|U1^T U2|_F^2` is then `i j / d`, a sum of i times j squares, each of one
coordinate of a random unit vector.
Source: arXiv:2106.09685, section 7.2 and appendix G.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lora_inject.analysis.blocks import SiteBlock

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
    """Return the singular directions of A or B of a block, `(in, k)` or `(out, k)`.

    A and B of a site with a frozen start (pissa, olora) hold that start too: there the directions
    are those of the delta.
    """
    if block.frozen_start:
        U, _, V = block.delta.svd()
        return V if side == "right" else U
    return directions(block.A if side == "right" else block.B, side)


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Compare two sets of orthonormal directions, `(d, k1)` and `(d, k2)`, the strongest first.

    Returns:
        `(k1, k2)` float64; the entry `[i - 1, j - 1]` is `phi(i, j)`, in [0, 1].
    """
    overlap = (first.T @ second).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, device=overlap.device) for n in overlap.shape)
    return (overlap / torch.minimum(i[:, None], j)).clamp(max=1.0)


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
        torch.randn(rank, dim, generator=generator, dtype=torch.float64, device="cpu")
        for rank in (rank1, rank2)
    )
    return subspace_similarity(first, second)
