"""The weights that an adapter updates, streamed from a checkpoint, and what becomes of it there.

`checkpoint.places` finds the place of each update, as for a merge. Here the same rows are read,
once, and counted instead of written, so memory does not grow with W.

A model of 16 bits holds `Q(W)`, and after merging `Q(W + D)`. Their difference is measured as in a
merge. If W is stored in that format, `Q(W) = W`, and it is what `merge` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from lora_inject.analysis.numbers import Place, blocks_of_terms
from lora_inject.checkpoint import Checkpoint, MergeOptions, WeightedAdapter
from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.places import place_adapter
from lora_inject.checkpoint.quantized_base import why_no_update
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.row_reader import RowReader
from lora_inject.core.files.safetensors_file import FLOATS
from lora_inject.core.functional.fold import Delta, Tally
from lora_inject.core.spec.sites import Block
from lora_inject.core.spec.tables import Figures
from lora_inject.errors import CheckpointError


@dataclass(frozen=True)
class Rounded(Figures):
    """What a format leaves of a delta.

    Attributes:
        kept: `<Q(W + D) - Q(W), D> / <D, D>`: 1 if the delta survived, 0 if it was rounded away,
            NaN if a value overflows. If steps are larger than the delta, it may be far above 1 or
            below 0 by chance: see `likeness`.
        error: `|Q(W + D) - Q(W) - D| / |D|`; above 1 if rounding noise is larger than D.
    """

    kept: float
    error: float

    @property
    def likeness(self) -> float:
        """Cosine between what the weights got and the delta: 1 is all of it and nothing else.

        Follows from the two: `|Q(W + D) - Q(W)|^2 / |D|^2 = error^2 + 2 kept - 1`.
        """
        square = self.error**2 + 2 * self.kept - 1
        return 0.0 if square <= 0 else self.kept / math.sqrt(square)  # 0: nothing changed


FORMATS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "bfloat16": lambda values: values.bfloat16().to(values.dtype),
        "float16": lambda values: values.half().to(values.dtype),
    }
)
"""Name to the round trip of values in float32 or float64: to the nearest, ties to even."""


@dataclass(frozen=True)
class BlockOnWeight(Place):
    """One block compared with the part of W that it updates: Frobenius norms."""

    tensor: str  # name of W in the checkpoint
    delta_norm: float  # `|D|`
    weight_norm: float  # `|W|`

    @property
    def relative(self) -> float:
        """`|D| / |W|`; NaN where both are zero."""
        if not self.weight_norm:
            return math.inf if self.delta_norm else math.nan
        return self.delta_norm / self.weight_norm


@dataclass(frozen=True)
class SiteOnWeight(Figures):
    """One site compared with its weight."""

    # its blocks; more than those of the site where the checkpoint splits them
    blocks: tuple[BlockOnWeight, ...]
    stored: str  # dtype of W in the checkpoint, such as `bfloat16`
    rounded: dict[str, Rounded]  # format to the part of the delta that it keeps in a merge


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
        self, state: AdapterState, checkpoint: Checkpoint, label: str, *, any_base: bool
    ) -> None:
        # Trained copies replace tensors; only updates are compared.
        updates = replace(state, trained=MappingProxyType({}), rows=MappingProxyType({}))
        part = WeightedAdapter(updates, label=label)
        asked = f"compare {label} with '{checkpoint.folder}'"
        try:
            places = place_adapter(part, BaseClass(checkpoint), MergeOptions(any_base=any_base))
        except CheckpointError as error:  # its words are about merging
            raise CheckpointError(asked, error.found, error.remedy) from None
        entries = [placed.source for job in places.jobs.values() for placed in job.placed]
        quantized = why_no_update(checkpoint, [entry.name for entry in entries])
        odd = [f"'{e.name}' is stored as {e.dtype}" for e in entries if e.dtype not in FLOATS]
        for problem in [quantized[0]] if quantized is not None else odd:
            raise CheckpointError(asked, problem, "Give the 16-bit checkpoint instead")
        self._state, self._places, self._checkpoint = state, places, checkpoint

    def n_bytes(self, site: str) -> int:
        """Return how many bytes of W belong to a site."""
        return sum(placed.source.n_bytes for placed in self._places.of_site(site))

    def look(self, site: str) -> SiteOnWeight:
        """Read the weight of a site and compare the update with it."""
        places = self._places.of_site(site)
        spec = self._state.sites[site].spec
        apart = spec.experts is not None and places[0].terms[0].spec.experts is None
        experts = spec.only or range(spec.experts or 0) if apart else ()
        tallies = {name: Tally() for name in FORMATS}
        blocks = []
        for number, placed in enumerate(places):
            # Places are in the order of the experts, several of each where the file cuts them.
            first = number * len(experts) // len(places)
            expert = f"expert {experts[first]} " if experts else ""
            parts = blocks_of_terms(placed.terms)
            squares = [0.0] * len(parts)
            wide = torch.float64 if placed.source.dtype == "F64" else torch.float32
            delta = Delta(placed.terms, wide)
            reader = RowReader(self._checkpoint.path_of(placed.source.name))
            for at, some in reader.blocks(placed.source, placed.n_cols):
                W = some.to(wide)
                D = delta.add_(torch.zeros_like(W), at)
                for name, tally in tallies.items():
                    base = FORMATS[name](W)
                    tally.count(base, D, D - (FORMATS[name](W + D) - base))
                for i, part in enumerate(parts):
                    squares[i] += _square(part.block, at, W)
            blocks += [
                BlockOnWeight(
                    site,
                    f"{expert}{part.label}".strip(),
                    placed.source.name,
                    math.sqrt(part.delta.square()),
                    math.sqrt(square),
                )
                for part, square in zip(parts, squares, strict=True)
            ]
        stored = str(FLOATS[places[0].source.dtype]).removeprefix("torch.")
        rounded = {name: Rounded(tally.kept, tally.error) for name, tally in tallies.items()}
        return SiteOnWeight(tuple(blocks), stored, rounded)


def _square(block: Block, start: int, rows: Tensor) -> float:
    """Return the sum of squares of a block, of those rows that begin at `start`."""
    first, last = (min(max(row - start, 0), len(rows)) for row in block.rows)
    return float(rows[first:last, slice(*block.cols)].double().square().sum())
