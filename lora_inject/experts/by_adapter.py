"""Stacked experts that are read with the updates of several adapters at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.core.functional.factors import Patch
from lora_inject.core.functional.lazy import Read, begun
from lora_inject.core.functional.torch_unstored import can_make
from lora_inject.core.functional.weight import LowRank, low_rank


def lazy_stack(weight: Tensor, each: Sequence[Sequence[Patch]]) -> Tensor:
    """Return stacked experts with each matrix once for each adapter, with the adapter's updates.

    Adapter by adapter for one expert, then the next expert.
    """
    read = _ReadForEach(weight, each)
    return begun(read) if can_make else read.formed()


class _ReadForEach(Read):
    """One reading of stacked experts with the updates of several adapters."""

    def __init__(self, weight: Tensor, each: Sequence[Sequence[Patch]]) -> None:
        self._each = each
        super().__init__(weight, [u for us in each for u in us], None, lambda: None, True, True)
        self.shape = torch.Size((len(weight) * len(each), *weight.shape[1:]))

    def sum(self) -> LowRank:
        """Return the matrices and their updates, with the graph of the caller."""
        return _low_rank_of_each(self.weight, self._each)


def _low_rank_of_each(weight: Tensor, each: Sequence[Sequence[Patch]]) -> LowRank:
    """Return stacked experts in which each has its matrix once with the updates of each adapter.

    All updates are one term, padded with zeros to one rank. `each` has the updates of an adapter,
    none if it leaves the weight as it is.
    """
    pairs = [_one_term(weight, patches) for patches in each]
    known = [pair for pair in pairs if pair is not None]
    if not known:
        return LowRank(weight, (), repeat=len(each))
    rank, (left, right) = max(left.shape[2] for left, _ in known), known[0]
    none = (torch.zeros_like(left), torch.zeros_like(right))
    lefts, rights = zip(*(none if pair is None else pair for pair in pairs), strict=True)
    left = torch.stack([F.pad(t, (0, rank - t.shape[2])) for t in lefts], 1).flatten(0, 1)
    right = torch.stack([F.pad(t, (0, 0, 0, rank - t.shape[1])) for t in rights], 1).flatten(0, 1)
    return LowRank(weight, ((left, right, 1.0),), repeat=len(each))


def _one_term(weight: Tensor, patches: Sequence[Patch]) -> tuple[Tensor, Tensor] | None:
    """Return all updates of stacked matrices as one product, scales included."""
    if not patches:
        return None
    terms = low_rank(weight, patches).terms
    left = torch.cat([left * scale for left, _, scale in terms], 2)
    return left, torch.cat([right for _, right, _ in terms], 1)
