"""All figures of one adapter, compared with W where its checkpoint is given, and what they tell.

An `Analysis` is plain numbers. What prints, draws or warns reads it and computes nothing. A finding
is a rule with a threshold that is stated here, the sentence that a reader gets, and the names it
holds for: inert sites, lost deltas, ranks that are not used. Nothing is changed or refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lora_inject.analysis.blocks import Figures, Place, Spectrum, site_blocks, spectrum
from lora_inject.analysis.rounding import Rounded
from lora_inject.analysis.weights import BlockOnWeight, SiteOnWeight, Weights
from lora_inject.checkpoint import Checkpoint
from lora_inject.checkpoint.write import Progress, counting_bytes
from lora_inject.core.adapter.state import AdapterState
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


@dataclass(frozen=True)
class Analysis(Figures):
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

    def on_weight(self) -> list[BlockOnWeight]:
        """Return every block compared with W, in the order of the sites."""
        return [block for site in self.weights.values() for block in site.blocks]


def analyze(
    state: AdapterState,
    base: Weights | str | Path | None = None,
    *,
    any_base: bool = False,
    label: str = "the adapter",
    progress: Progress | None = None,
) -> Analysis:
    """Compute the figures of an adapter, compared with its base if that is given.

    Args:
        state: The adapter.
        base: Its base, a safetensors checkpoint that is streamed, possibly as `Weights` of this
            adapter; None: the adapter alone.
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
        base = Weights(state, Checkpoint.open(base), label, any_base=any_base)
    sizes = {
        name: site.A.nbytes + site.B.nbytes + (base.n_bytes(name) if base else 0)
        for name, site in state.sites.items()
    }
    blocks: list[BlockFigures] = []
    compared: dict[str, SiteOnWeight] = {}
    for name in counting_bytes(sizes, progress):
        blocks += [
            BlockFigures(name, b.label, b.delta.shape, b.rank, spectrum(b.delta))
            for b in site_blocks(state.sites[name])
        ]
        if base is not None:
            compared[name] = base.look(name)
    folder = None if base is None else str(base.checkpoint.folder)
    return Analysis(tuple(blocks), compared, folder)


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


def findings(analysis: Analysis) -> tuple[Finding, ...]:
    """List what deserves attention, the most serious first.

    Args:
        analysis: The figures.

    Returns:
        One finding for each rule that holds somewhere.

    Examples:
        >>> import torch
        >>> from lora_inject.analysis.figures import analyze
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> from lora_inject.core.adapter.site_state import SiteState
        >>> from lora_inject.core.adapter.state import AdapterState
        >>> spec = SiteSpec("h.0.fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> site = SiteState(spec, torch.eye(2, 4), torch.zeros(6, 2))
        >>> [f.code for f in findings(analyze(AdapterState({"h.0.fc": site})))]
        ['inert']
    """

    def blocks(holds: Callable[[BlockFigures], bool]) -> tuple[str, ...]:
        return tuple(block.name for block in analysis.blocks if holds(block))

    def rounded(form: str, holds: Callable[[Rounded], bool]) -> tuple[str, ...]:
        roundings = {name: site.rounded.get(form) for name, site in analysis.weights.items()}
        return tuple(name for name, left in roundings.items() if left is not None and holds(left))

    loud = [b.name for b in analysis.on_weight() if b.norms.relative > LOUD]
    rules = (
        Finding("inert", True, "The delta is zero: B is, or it equals its frozen start. The site "
                "does nothing.", blocks(lambda b: not b.spectrum.rank)),
        Finding("loud", True, "The delta outweighs the weight (|D| > |W|). Training may have "
                "diverged, or the scale is not the one it was trained with.",
                tuple(dict.fromkeys(loud))),
        Finding("overflow", True, "The merged weight does not fit into float16.",
                rounded("float16", lambda r: math.isnan(r.kept))),
        Finding("lost", True, f"Merged in bfloat16, less than {LEAST_KEPT * 100:.0f}% of the delta "
                "survives rounding. Keep the adapter apart, or merge in float32.",
                rounded("bfloat16", lambda r: r.kept < LEAST_KEPT)),
        Finding("noise", False, "Merged in bfloat16, rounding changes the weight by more than the "
                "delta (error above 1).",
                rounded("bfloat16", lambda r: r.kept >= LEAST_KEPT and r.error > 1)),
        Finding("one-direction", False, f"One direction holds {ONE_DIRECTION * 100:.0f}% of the "
                "energy or more: rank 1 would do.", blocks(_one_direction)),
        Finding("spare-rank", False, f"99% of the energy fits into 1/{SPARE} of the rank or less.",
                blocks(_spare_rank)),
    )  # fmt: skip
    return tuple(finding for finding in rules if finding.names)


def _one_direction(block: BlockFigures) -> bool:
    return block.rank > 1 and block.spectrum.first_share >= ONE_DIRECTION


def _spare_rank(block: BlockFigures) -> bool:
    needed = block.spectrum.rank_for(0.99)
    return not _one_direction(block) and 0 < needed * SPARE <= block.rank
