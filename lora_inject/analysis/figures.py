"""All figures of one adapter, alone and compared with W, and what they tell.

An `Analysis` is plain numbers. What prints, draws or warns reads it and computes nothing. A finding
is a rule with a threshold that is stated here, the sentence that a reader gets, and the names it
holds for: inert sites, lost deltas, ranks that are not used. Nothing is changed or refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from statistics import median

from lora_inject.analysis.numbers import (
    SHARES,
    Place,
    Spectrum,
    site_blocks,
    spectrum,
)
from lora_inject.analysis.weights import BlockOnWeight, Rounded, SiteOnWeight, Weights
from lora_inject.checkpoint import Checkpoint
from lora_inject.checkpoint.pieces import Progress, counting_bytes
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.names import counted, templates
from lora_inject.core.spec.tables import Figures, Listing, ListReport, listed, number, wrapped
from lora_inject.errors import StateError

ONE_DIRECTION = 0.99  # of the energy in the first direction: a block that has only one
SPARE = 2  # a rank is larger than needed where 99% of the energy fits into the rank over this
LEAST_KEPT = 0.9  # share of a delta that must survive rounding
LOUD = 1.0  # `|D| / |W|` from which a delta outweighs its weight


@dataclass(frozen=True)
class BlockFigures(Place):
    """One low-rank block in numbers."""

    shape: tuple[int, int]  # `(out, in)` of the delta
    rank: int  # r as configured
    spectrum: Spectrum  # singular values of the delta

    @property
    def needed_share(self) -> float:
        """The rank that holds 99% of the energy, over the configured rank."""
        return self.spectrum.rank_for(0.99) / self.rank

    @property
    def one_direction(self) -> bool:
        """Whether one direction holds all but a hundredth of the energy."""
        return self.rank > 1 and self.spectrum.first_share >= ONE_DIRECTION

    @property
    def spare_rank(self) -> bool:
        """Whether 99% of the energy fit into half of the rank."""
        return not self.one_direction and 0 < self.needed_share <= 1 / SPARE


@dataclass(frozen=True)
class Finding(Figures):
    """One thing to know.

    Attributes:
        code: Its rule: `inert`, `one-direction`, `spare-rank`, `lost`, `noise`, `overflow`, `loud`.
        serious: Whether the adapter does not do what it was trained for.
        text: What it means.
        names: The sites or blocks that it holds for.
    """

    code: str
    serious: bool
    text: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Analysis(ListReport):
    """An adapter in numbers.

    Attributes:
        blocks: Every block of every site.
        weights: Site to its comparison with W; empty without a base.
        base: Folder of the base, None without one.
    """

    blocks: tuple[BlockFigures, ...]
    weights: dict[str, SiteOnWeight] = field(default_factory=dict)
    base: str | None = None

    @property
    def n_sites(self) -> int:
        """How many sites there are."""
        return len({block.site for block in self.blocks})

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What deserves attention, the most serious first: one for each rule that holds somewhere.

        Examples:
            >>> import torch
            >>> from lora_inject.core.spec.sites import SiteSpec
            >>> from lora_inject.core.adapter.site_state import SiteState
            >>> spec = SiteSpec("h.0.fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
            >>> site = SiteState(spec, torch.eye(2, 4), torch.zeros(6, 2))
            >>> [f.code for f in analyze(AdapterState({"h.0.fc": site})).findings]
            ['inert']
        """

        def blocks(holds: Callable[[BlockFigures], bool]) -> tuple[str, ...]:
            return tuple(block.name for block in self.blocks if holds(block))

        def rounded(form: str, holds: Callable[[Rounded], bool]) -> tuple[str, ...]:
            sites = self.weights.items()
            return tuple(name for name, site in sites if holds(site.rounded[form]))

        loud = [b.name for b in self.on_weight() if b.relative > LOUD]
        rules = (
            Finding("inert", True, "The delta is zero: B is, or it equals its frozen start. The "
                    "site does nothing.", blocks(lambda b: not b.spectrum.rank)),
            Finding("loud", True, "The delta outweighs the weight (|D| > |W|). Training may have "
                    "diverged, or the scale is not the one it was trained with.",
                    tuple(dict.fromkeys(loud))),
            Finding("overflow", True, "The merged weight does not fit into float16.",
                    rounded("float16", lambda r: math.isnan(r.kept))),
            Finding("lost", True, f"Merged in bfloat16, less than {LEAST_KEPT * 100:.0f}% of the "
                    "delta survives rounding. Keep the adapter apart, or merge in float32.",
                    rounded("bfloat16", lambda r: r.kept < LEAST_KEPT)),
            Finding("noise", False, "Merged in bfloat16, rounding changes the weight by more than "
                    "the delta (error above 1).",
                    rounded("bfloat16", lambda r: r.kept >= LEAST_KEPT and r.error > 1)),
            Finding("one-direction", False, f"One direction holds {ONE_DIRECTION * 100:.0f}% of "
                    "the energy or more: rank 1 would do.", blocks(attrgetter("one_direction"))),
            Finding("spare-rank", False, f"99% of the energy fits into 1/{SPARE} of the rank or "
                    "less.", blocks(attrgetter("spare_rank"))),
        )  # fmt: skip
        return tuple(finding for finding in rules if finding.names)

    def on_weight(self) -> list[BlockOnWeight]:
        """Return every block compared with W, in the order of the sites."""
        return [block for site in self.weights.values() for block in site.blocks]

    def block_rows(self) -> Listing:
        """Return the size and the needed ranks of the delta of each block."""
        figures = attrgetter("norm", "first_share", "stable_rank", "effective_rank")
        blocks = ((b.name, b.rank, b.spectrum) for b in self.blocks)
        rows = ((n, rank, *figures(s), *map(float, s.needed.values())) for n, rank, s in blocks)
        heads = ("block", "rank", "|D|", "first", "stable", "effective", *map(percent, SHARES))
        return Listing(heads, tuple(rows))

    def weight_rows(self) -> Listing:
        """Return how each block compares with the weight that it updates."""
        beside = self.on_weight()
        rows = tuple((Place(b.tensor, b.label).name, b.weight_norm, b.relative) for b in beside)
        return Listing(("tensor", "|W|", "|D|/|W|"), rows)

    def rounding_rows(self) -> Listing:
        """Return the part of each delta that each format keeps, and the error."""
        sites = self.weights
        formats = next(iter(sites.values())).rounded if sites else ()
        rows = tuple(
            (name, site.stored, *((r.kept, r.error) for r in site.rounded.values()))
            for name, site in sites.items()
        )
        return Listing(("kept (error) after merging in", "stored", *formats), rows)

    def _lines(self, width: int, *, everything: bool) -> Iterator[str]:
        tables = [self.block_rows(), self.weight_rows(), self.rounding_rows()]
        for rows in tables:
            if rows.cells:
                yield from rows.lines(width, everything=everything)
                yield ""
        if not everything and len(self.blocks) > len(tables[0].by_kind().cells):
            yield "Numbers of several blocks are medians; --all lists each block."
        for finding in self.findings:
            yield from wrapped(f"{finding.code}: {finding.text}", width)
            head = f"  {len(finding.names):,}:"
            yield from listed(head, templates(finding.names), width, everything=everything)
        all_of_it = f"{counted(self.n_sites, 'site')}, {counted(len(self.blocks), 'block')}"
        yield f"{all_of_it}; rank {needed_rank(self.blocks):g} holds 99% (median)"


def needed_rank(blocks: Iterable[BlockFigures]) -> float:
    """Return the rank that holds 99% of the energy, the median of all blocks."""
    return median(block.spectrum.rank_for(0.99) for block in blocks)


def percent(share: float) -> str:
    """Return a share in percent: `0.99` as `99%`."""
    return f"{share * 100:.3g}%" if math.isfinite(share) else number(share)


def analyze(
    state: AdapterState,
    base: Checkpoint | str | Path | None = None,
    *,
    any_base: bool = False,
    label: str = "the adapter",
    progress: Progress | None = None,
) -> Analysis:
    """Compute the figures of an adapter, compared with its base if it is given.

    Args:
        state: The adapter.
        base: Its base, a safetensors checkpoint that is streamed; None: the adapter alone.
        any_base: Compare although the adapter was made on another base.
        label: What to call the adapter in messages.
        progress: Called with bytes done and bytes in all.

    Returns:
        The figures.

    Raises:
        StateError: The adapter has no sites, or holds NaN or Inf.
        CheckpointError: It does not fit the base.

    Examples:
        >>> import torch
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> from lora_inject.core.adapter.site_state import SiteState
        >>> spec = SiteSpec("h.0.fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> site = SiteState(spec, torch.eye(2, 4), torch.eye(6, 2))
        >>> block = analyze(AdapterState({"h.0.fc": site})).blocks[0]
        >>> block.kind, block.spectrum.values.tolist(), block.spectrum.stable_rank
        ('h.*.fc', [2.0, 2.0], 2.0)
    """
    if not state.sites:
        problem = "it has no low-rank sites"
        raise StateError(f"analyze {label}", problem, "Only A and B can be analyzed")
    state.check_finite(f"analyze {label}")
    if isinstance(base, str | Path):
        base = Checkpoint.open(base)
    weights = None if base is None else Weights(state, base, label, any_base=any_base)
    sizes = {
        name: site.A.nbytes + site.B.nbytes + (weights.n_bytes(name) if weights else 0)
        for name, site in state.sites.items()
    }
    blocks: list[BlockFigures] = []
    on_weight: dict[str, SiteOnWeight] = {}
    for name in counting_bytes(sizes, progress):
        blocks += [
            BlockFigures(name, b.label, b.delta.shape, b.rank, spectrum(b.delta))
            for b in site_blocks(state.sites[name])
        ]
        if weights is not None:
            on_weight[name] = weights.look(name)
    folder = None if base is None else str(base.folder)
    return Analysis(tuple(blocks), on_weight, folder)
