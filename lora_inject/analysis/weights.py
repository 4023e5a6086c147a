"""The weights that an adapter updates, streamed from a checkpoint.

`checkpoint.choose` finds the place of each update, as for a merge. Here the same rows are read
block by block and analyzed instead of written, so memory does not grow with W.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from lora_inject.adapter.state import AdapterState
from lora_inject.adapter.svd import decompose
from lora_inject.analysis.amplifying import Amplification, amplification
from lora_inject.analysis.blocks import Figures, Place, SiteBlock, blocks_of_terms
from lora_inject.analysis.rounding import Rounded, rounding_of_rows
from lora_inject.checkpoint import Checkpoint, MergeOptions, WeightedAdapter
from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.choose import Fit, choose
from lora_inject.checkpoint.place import Placed
from lora_inject.checkpoint.quantized import why_not
from lora_inject.errors import CheckpointError
from lora_inject.functional import Delta
from lora_inject.storage.tensor_rows import FLOATS, RowReader


@dataclass(frozen=True)
class BlockOnWeight(Place):
    """One block compared with the part of W that it updates."""

    tensor: str  # name of W in the checkpoint
    norms: Amplification  # the norms of Table 7


@dataclass(frozen=True)
class SiteOnWeight(Figures):
    """One site compared with its weight."""

    # its blocks; more than those of the site where the checkpoint splits them
    blocks: tuple[BlockOnWeight, ...]
    stored: str  # dtype of W in the checkpoint, such as `bfloat16`
    rounded: dict[str, Rounded]  # format to the part of the delta that it keeps in a merge

    @property
    def changed(self) -> bool:
        """Whether there is a delta at all."""
        return any(block.norms.delta_norm for block in self.blocks)


class Weights:
    """The weights of a checkpoint under the sites of an adapter.

    Args:
        state: The adapter.
        checkpoint: Its base.
        label: What to call the adapter in messages.
        any_base: Compare although the adapter's fingerprint says that it was made on another base.

    Raises:
        CheckpointError: A site has no place in it, its weight is quantized, or it is another base.
    """

    def __init__(
        self,
        state: AdapterState,
        checkpoint: Checkpoint,
        label: str = "the adapter",
        *,
        any_base: bool = False,
    ) -> None:
        # Trained copies replace tensors; only updates are compared.
        updates = replace(state, trained=MappingProxyType({}), rows=MappingProxyType({}))
        part = WeightedAdapter(updates, label=label)
        self.checkpoint = checkpoint
        self._state = state
        self._fit = _fit(part, checkpoint, MergeOptions(any_base=any_base))

    def n_bytes(self, site: str) -> int:
        """Return how many bytes of W belong to a site."""
        return sum(
            (placed.stop - placed.start) * placed.n_cols * FLOATS[placed.source.dtype].itemsize
            for placed in self._fit.places(site)
        )

    def look(self, site: str) -> SiteOnWeight:
        """Read the weight of a site and compare the update with it, as `analyze` says."""
        places = self._fit.places(site)
        n_experts = self._state.sites[site].spec.experts
        blocks: list[BlockOnWeight] = []
        rows = [self._open(placed) for placed in places]
        pairs = (pair for each in rows for pair in each.with_delta())
        rounded = rounding_of_rows(pairs)
        for number, each in enumerate(rows):
            # Places are in the order of the experts, several of each where the file cuts them.
            expert = f"expert {number * n_experts // len(places)} " if n_experts else ""
            for block in blocks_of_terms(each.placed.terms):
                of_block = partial(each.of, block)
                norms = amplification(of_block, block.delta, transposed=block.transposed)
                label = f"{expert}{block.label}".strip()
                blocks.append(BlockOnWeight(site, label, each.placed.source.name, norms))
        stored = str(FLOATS[places[0].source.dtype]).removeprefix("torch.")
        return SiteOnWeight(tuple(blocks), stored, rounded)

    def directions(self, site: str, n: int) -> list[tuple[SiteBlock, Tensor]]:
        """Return each block of a site with the top n input directions of the W that it updates.

        The directions are `(in, n)`, float64, by an SVD that is exact for small weights.
        """
        found = []
        for placed in self._fit.places(site):
            rows = self._open(placed)
            for block in blocks_of_terms(placed.terms):
                wide = [some.to(torch.float32, copy=True) for _, some in rows.of(block)]
                top = decompose(torch.cat(wide), min(n, *block.delta.shape))
                found.append((block, (top.U if block.transposed else top.V).double()))
        return found

    def _open(self, placed: Placed) -> _Rows:
        return _Rows(placed, RowReader(self.checkpoint.path_of(placed.source.name)))


@dataclass(frozen=True)
class _Rows:
    """The rows of one place, counted from its first; each is valid until the next are asked for."""

    placed: Placed
    reader: RowReader

    def between(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Yield `(first row, rows)`."""
        entry, n_cols, first = self.placed.source, self.placed.n_cols, self.placed.start
        for at, rows in self.reader.blocks(entry, n_cols, first + start, first + stop):
            yield at - first, rows

    def with_delta(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all rows of W, and those of D."""
        for start, some in self.between(0, self.placed.stop - self.placed.start):
            wide = torch.float64 if some.dtype == torch.float64 else torch.float32
            delta = Delta(self.placed.terms, wide)
            yield some, delta.add_(torch.zeros(some.shape, dtype=wide, device="cpu"), start)

    def of(self, block: SiteBlock) -> Iterator[tuple[int, Tensor]]:
        """Yield the rows of the part of W that one block updates, counted from its first."""
        top, columns = block.block.rows[0], slice(*block.block.cols)
        for start, some in self.between(*block.block.rows):
            yield start - top, some[:, columns]


def _fit(part: WeightedAdapter, checkpoint: Checkpoint, options: MergeOptions) -> Fit:
    asked = f"compare {part.label} with '{checkpoint.folder}'"
    try:
        fit = choose(part, BaseClass(checkpoint), options)
    except CheckpointError as error:  # its words are about merging
        raise CheckpointError(asked, error.found, error.remedy) from None
    entries = [placed.source for job in fit.jobs.values() for placed in job.placed]
    quantized = why_not(checkpoint, [entry.name for entry in entries])
    odd = [f"'{e.name}' is stored as {e.dtype}" for e in entries if e.dtype not in FLOATS]
    for found in [quantized[0]] if quantized is not None else odd:
        raise CheckpointError(asked, found, "Give the 16-bit checkpoint instead")
    return fit
