"""Two adapters, or the layers of one: what their subspaces have in common.

Blocks of the same name are compared by phi for all i and j, on the side of A and on the side of B,
and each number comes with the one that chance would give.
Source: arXiv:2106.09685, section 7.2, figures 3, 4, 6 and 7.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_inject.adapter.state import AdapterState
from lora_inject.analysis.blocks import Figures, Place, SiteBlock, by_kind, site_blocks
from lora_inject.analysis.subspaces import Side, block_directions, similarity
from lora_inject.checkpoint.write import Progress, counted
from lora_inject.errors import StateError

MOST_LAYERS = 256
"""Kinds with more blocks are left out of `across_layers`: their table would be unreadable."""


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
        only_second: Likewise.
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
        StateError: They have no site in common, a common site has different widths, or a tensor
            holds NaN or Inf.

    Examples:
        >>> from lora_inject.spec.sites import SiteSpec
        >>> from lora_inject.adapter.site_state import SiteState
        >>> spec = SiteSpec("fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> one = AdapterState({"fc": SiteState(spec, torch.eye(2, 4), torch.eye(6, 2))})
        >>> pair = compare(one, one).pairs[0]
        >>> pair.right.whole, pair.right.whole_by_chance
        (1.0, 0.5)
    """
    common = [name for name in first.sites if name in second.sites]
    if not common:
        found = f"of {len(first.sites)} and {len(second.sites)} sites none has the same name"
        raise StateError("compare two adapters", found, "Compare adapters of one base")
    sizes = {name: first.sites[name].A.nbytes + first.sites[name].B.nbytes for name in common}
    pairs = [pair for name in counted(sizes, progress) for pair in _pairs(name, first, second)]
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
            found = f"one updates {list(one.delta.shape)}, the other {list(two.delta.shape)}"
            remedy = "Compare adapters of one base"
            raise StateError(f"compare '{name}' of two adapters", found, remedy)
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
    found = {}
    for kind, blocks in by_kind(b for s in state.sites.values() for b in site_blocks(s)).items():
        spans = [block_directions(block) for block in blocks]
        if 1 < len(spans) <= MOST_LAYERS and len({U.shape[0] for U in spans}) == 1:
            found[kind] = [block.name for block in blocks], _all_pairs(spans)
    return found


def _all_pairs(spans: list[Tensor]) -> Tensor:
    counts = torch.tensor([U.shape[1] for U in spans], device="cpu")
    owner = torch.repeat_interleave(torch.arange(len(spans), device="cpu"), counts)
    everything = torch.cat(spans, 1)
    table = torch.zeros(len(spans), len(spans), dtype=torch.float64, device="cpu")
    for i, U in enumerate(spans):
        table[i].index_add_(0, owner, (U.T @ everything).square().sum(0))
    smaller = torch.minimum(counts[:, None], counts[None])
    return (table / smaller).clamp(max=1.0)  # 0 / 0 is NaN
