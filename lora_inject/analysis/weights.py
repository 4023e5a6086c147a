"""The weights that an adapter updates, streamed from a checkpoint.

Where each update lands is what merging has found out already (`checkpoint.choose`), with
names translated, experts cut or stacked and the way round settled. Here the same rows are read
block by block and looked at instead of written, so memory does not grow with W.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from lora_inject.adapter.state import AdapterState
from lora_inject.analysis.amplifying import Amplification, amplification_of_rows
from lora_inject.analysis.rounding import Rounded, RoundingTally
from lora_inject.analysis.thin import SiteBlock, blocks_of_terms
from lora_inject.checkpoint import Checkpoint, WeightedAdapter
from lora_inject.checkpoint.choose import Fit, choose
from lora_inject.checkpoint.output_files import FLOATS
from lora_inject.checkpoint.place import Placed
from lora_inject.checkpoint.quantized import why_not
from lora_inject.checkpoint.read import RowReader, rows_per_block
from lora_inject.checkpoint.same_base import check_same_base
from lora_inject.checkpoint.svd import decompose
from lora_inject.errors import CheckpointError
from lora_inject.functional import fold_rows_


@dataclass(frozen=True)
class BlockOnWeight:
    """One block compared with the part of W that it updates.

    Attributes:
        label: Slice and expert of the block, as in `SiteBlock`.
        tensor: Name of W in the checkpoint.
        norms: The norms of Table 7.
    """

    label: str
    tensor: str
    norms: Amplification


@dataclass(frozen=True)
class SiteOnWeight:
    """One site compared with its weight.

    Attributes:
        blocks: Its blocks; more than the site itself has where the checkpoint cuts them.
        stored: Dtype of W in the checkpoint, such as `bfloat16`.
        rounded: Format to what it leaves of the delta after merging.
    """

    blocks: tuple[BlockOnWeight, ...]
    stored: str
    rounded: dict[str, Rounded]

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
        # Trained copies replace tensors; what is asked here is about updates only.
        part = WeightedAdapter(replace(state, trained=MappingProxyType({})), label=label)
        self.checkpoint = checkpoint
        self._state = state
        self._fit = _fit(part, checkpoint, any_base=any_base)

    def n_bytes(self, site: str) -> int:
        """Return how many bytes of W belong to a site."""
        return sum(_n_bytes(placed) for placed in self._fit.placed[site])

    def look(
        self,
        site: str,
        rank: int | None = None,
        *,
        own: bool = True,
        formats: Collection[str] | None = None,
    ) -> SiteOnWeight:
        """Read the weight of a site and compare the update with it.

        Args:
            site: Its name in the adapter.
            rank: How many directions to compare; those of the delta by default.
            own: Whether to compare with W's own directions, too.
            formats: Formats to round to; all by default.
        """
        tally = RoundingTally(formats)
        blocks: list[BlockOnWeight] = []
        places = self._fit.placed[site]
        n_experts = self._state.sites[site].spec.experts
        with ExitStack() as stack:
            for number, placed in enumerate(places):
                rows = _Rows(placed, stack.enter_context(self._reader(placed)))
                for start, some in rows.blocks((0, placed.stop - placed.start)):
                    delta = torch.zeros(some.shape, dtype=_wide(some))
                    fold_rows_(delta, start, placed.terms)
                    tally.add(some, delta)
                # Places are in the order of the experts, several of each where the file cuts them.
                expert = f"expert {number * n_experts // len(places)} " if n_experts else ""
                for block in blocks_of_terms(placed.terms):
                    norms = rows.amplification(block, rank, own=own)
                    label = f"{expert}{block.label}".strip()
                    blocks.append(BlockOnWeight(label, placed.source.name, norms))
        stored = str(FLOATS[places[0].source.dtype]).removeprefix("torch.")
        return SiteOnWeight(tuple(blocks), stored, tally.results())

    def directions(self, site: str, n: int) -> list[tuple[SiteBlock, Tensor]]:
        """Return each block of a site with the top input directions of the W that it updates.

        Args:
            site: Its name in the adapter.
            n: How many directions.

        Returns:
            Blocks, each with `(in, n)` right singular vectors of its W, float64, by an SVD that is
            exact for small weights.
        """
        found = []
        for placed in self._fit.placed[site]:
            with self._reader(placed) as reader:
                rows = _Rows(placed, reader)
                for block in blocks_of_terms(placed.terms):
                    shape = block.delta.shape[::-1] if block.transposed else block.delta.shape
                    matrix = torch.cat([some.clone() for _, some in rows.wide_of(block)()])
                    top = decompose(matrix, min(n, *shape))
                    found.append((block, (top.U if block.transposed else top.V).double()))
        return found

    def _reader(self, placed: Placed) -> RowReader:
        shard = self.checkpoint.shards[self.checkpoint.shard_of[placed.source.name]]
        return RowReader(shard.path)


@dataclass(frozen=True)
class _Rows:
    """The rows of one place, counted from its first."""

    placed: Placed
    reader: RowReader

    def blocks(self, span: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
        """Yield `(first row, rows)`; the rows are valid until the next are asked for."""
        entry, n_cols, first = self.placed.source, self.placed.n_cols, self.placed.start
        step = rows_per_block(n_cols)
        for start in range(*span, step):
            stop = min(span[1], start + step)
            yield start, self.reader.rows(entry, n_cols, first + start, first + stop)

    def amplification(self, block: SiteBlock, rank: int | None, *, own: bool) -> Amplification:
        """Compare one block with the part of W that it updates."""
        transposed = block.transposed
        return amplification_of_rows(
            lambda: self.of(block), block.delta, rank, transposed=transposed, own=own
        )

    def wide_of(self, block: SiteBlock) -> Callable[[], Iterator[tuple[int, Tensor]]]:
        """Return what gives the rows of one block in float32, anew at every call."""
        return lambda: ((start, rows.float()) for start, rows in self.of(block))

    def of(self, block: SiteBlock) -> Iterator[tuple[int, Tensor]]:
        """Yield the rows of the part of W that one block updates, counted from its first."""
        top, columns = block.block.rows[0], slice(*block.block.cols)
        for start, some in self.blocks(block.block.rows):
            yield start - top, some[:, columns]


def _fit(part: WeightedAdapter, checkpoint: Checkpoint, *, any_base: bool) -> Fit:
    asked = f"compare {part.label} with '{checkpoint.folder}'"
    try:
        fit = choose(part, checkpoint)
        if not any_base:
            check_same_base(checkpoint, part, fit)
    except CheckpointError as error:  # which speaks of merging
        raise CheckpointError(asked, error.found, error.remedy) from None
    entries = [placed.source for places in fit.placed.values() for placed in places]
    quantized = why_not(checkpoint, [entry.name for entry in entries])
    if quantized is not None:
        raise CheckpointError(asked, quantized.found, "Give the 16-bit checkpoint instead")
    for entry in entries:
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                asked, f"'{entry.name}' is stored as {entry.dtype}", "Give a 16-bit checkpoint"
            )
    return fit


def _n_bytes(placed: Placed) -> int:
    return (placed.stop - placed.start) * placed.n_cols * FLOATS[placed.source.dtype].itemsize


def _wide(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32
