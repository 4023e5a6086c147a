"""How much subspaces have in common: of two matrices, of two adapters, of the layers of one.

Two sets of singular directions are compared by eq. (4) of the paper.
`phi(i, j) = |U1_i^T U2_j|_F^2 / min(i, j)` for all i and j is one product of the two sets
of directions, squared, and summed along both sides. It is 1 where the smaller span lies in the
larger, 0 where they are orthogonal, and `max(i, j) / d` on average for random spans in d
dimensions: the mean of `|U1^T U2|_F^2` is then `i j / d`, a sum of i times j squares, each of one
coordinate of a random unit vector.

Of two adapters blocks of the same name are compared, on the side of A and on the side of B, and
each number comes with the one that chance would give.
Source: arXiv:2106.09685, section 7.2, figures 3, 4, 6 and 7, and appendix G.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_inject.algebra.values import called
from lora_inject.analysis.blocks import Figures, Place, SiteBlock, by_kind, site_blocks
from lora_inject.checkpoint.write import Progress, counting_bytes
from lora_inject.core.adapter.state import AdapterState
from lora_inject.errors import StateError

MOST_LAYERS = 256
"""Kinds with more blocks are left out of `across_layers`: their table would be unreadable."""
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
    span: Tensor = Vh[:n].T if side == "right" else U[:, :n]
    return span


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


# Adapters ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap(Figures):
    """Phi of one pair of blocks on one side."""

    phi: Tensor  # `(k1, k2)` float64; the entry `[i - 1, j - 1]` is `phi(i, j)`
    dim: int  # d, the width that the spans live in

    @property
    def first(self) -> float:
        """`phi(1, 1)`; NaN where a side has no directions."""
        return float(self.phi[0, 0]) if self.phi.numel() else math.nan

    @property
    def whole(self) -> float:
        """`phi(k1, k2)`; NaN where a side has no directions."""
        return float(self.phi[-1, -1]) if self.phi.numel() else math.nan

    @property
    def whole_by_chance(self) -> float:
        """The mean of `whole` over random subspaces, `max(k1, k2) / d`."""
        return max(self.phi.shape) / self.dim


@dataclass(frozen=True)
class Pair(Place):
    """One block in both adapters."""

    ranks: tuple[int, int]  # r of the first and of the second
    right: Overlap  # on the side of A
    left: Overlap  # on the side of B


@dataclass(frozen=True)
class Comparison(Figures):
    """Two adapters compared.

    Attributes:
        pairs: Every block that both have.
        only_first: Names of sites that only the first has.
        only_second: Names of sites that only the second has.
    """

    pairs: tuple[Pair, ...]
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()


def compare(
    first: AdapterState, second: AdapterState, progress: Progress | None = None
) -> Comparison:
    """Compare two adapters of one base: of two ranks, of two seeds, of two tasks.

    Args:
        first: One adapter.
        second: The other.
        progress: Called with bytes done and bytes in all.

    Returns:
        Phi for every block that both have.

    Raises:
        StateError: They have no site in common, a common site has different widths, or one of them
            holds NaN or Inf.

    Examples:
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> from lora_inject.core.adapter.site_state import SiteState
        >>> spec = SiteSpec("fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> one = AdapterState({"fc": SiteState(spec, torch.eye(2, 4), torch.eye(6, 2))})
        >>> pair = compare(one, one).pairs[0]
        >>> pair.right.whole, pair.right.whole_by_chance
        (1.0, 0.5)
    """
    for state, name in zip((first, second), called((first, second)), strict=True):
        state.check_finite(f"compare, {name}")
    common = [name for name in first.sites if name in second.sites]
    if not common:
        problem = f"of {len(first.sites)} and {len(second.sites)} sites none has the same name"
        raise StateError("compare two adapters", problem, "Compare adapters of one base")
    sizes = {name: first.sites[name].A.nbytes + first.sites[name].B.nbytes for name in common}
    pairs = [
        pair for name in counting_bytes(sizes, progress) for pair in _pairs(name, first, second)
    ]
    return Comparison(
        tuple(pairs),
        tuple(name for name in first.sites if name not in second.sites),
        tuple(name for name in second.sites if name not in first.sites),
    )


def _pairs(name: str, first: AdapterState, second: AdapterState) -> Iterator[Pair]:
    theirs = {block.label: block for block in site_blocks(second.sites[name])}
    for one in site_blocks(first.sites[name]):
        two = theirs.get(one.label)
        if two is None:
            continue
        if one.delta.shape != two.delta.shape:
            shapes = zip(called((first, second)), (one, two), strict=True)
            problem = " and ".join(f"{n} updates {list(b.delta.shape)}" for n, b in shapes)
            remedy = "Compare adapters of one base"
            raise StateError(f"compare '{name}' of two adapters", problem, remedy)
        ranks = one.rank, two.rank
        yield Pair(name, one.label, ranks, _overlap(one, two, "right"), _overlap(one, two, "left"))


def _overlap(one: SiteBlock, two: SiteBlock, side: Side) -> Overlap:
    first = block_directions(one, side)
    return Overlap(similarity(first, block_directions(two, side)), first.shape[0])


def across_layers(state: AdapterState) -> dict[str, tuple[list[str], Tensor]]:
    """Compare the layers of one adapter by their whole spans of A, kind by kind.

    Args:
        state: The adapter.

    Returns:
        Kind to the names of its blocks and `(n, n)` of `phi(k, k)`; NaN where a block has no
        directions. Kinds of a single block, of mixed widths or of too many experts are left out.

    Raises:
        StateError: A tensor holds NaN or Inf.
    """
    phis = {}
    for kind, blocks in by_kind(b for s in state.sites.values() for b in site_blocks(s)).items():
        spans = [block_directions(block) for block in blocks]
        if 1 < len(spans) <= MOST_LAYERS and len({U.shape[0] for U in spans}) == 1:
            phis[kind] = [block.name for block in blocks], _all_pairs(spans)
    return phis


def _all_pairs(spans: list[Tensor]) -> Tensor:
    counts = torch.tensor([U.shape[1] for U in spans], device="cpu")
    owner = torch.repeat_interleave(torch.arange(len(spans), device="cpu"), counts)
    everything = torch.cat(spans, 1)
    table = torch.zeros(len(spans), len(spans), dtype=torch.float64, device="cpu")
    for i, U in enumerate(spans):
        table[i].index_add_(0, owner, (U.T @ everything).square().sum(0))
    smaller = torch.minimum(counts[:, None], counts[None])
    return (table / smaller).clamp(max=1.0)  # 0 / 0 is NaN
