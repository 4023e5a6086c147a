"""What in an analysis deserves attention: inert sites, lost deltas, ranks that are not used.

A finding is a rule with a threshold that is stated here, the sentence that a reader gets, and the
names it holds for. The figures behind it are in the analysis; nothing is changed or refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lora_inject.analysis.blocks import Figures
from lora_inject.analysis.figures import Analysis, BlockFigures
from lora_inject.analysis.rounding import Rounded

ONE_DIRECTION = 0.99  # of the energy in the first direction: a block that has only one
SPARE = 2  # a rank is larger than needed where 99% of the energy fits into the rank over this
LEAST_KEPT = 0.9  # share of a delta that must survive rounding
LOUD = 1.0  # `|D| / |W|` from which a delta outweighs its weight


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
        >>> from lora_inject.spec.sites import SiteSpec
        >>> from lora_inject.adapter.site_state import SiteState
        >>> from lora_inject.adapter.state import AdapterState
        >>> spec = SiteSpec("h.0.fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> site = SiteState(spec, torch.eye(2, 4), torch.zeros(6, 2))
        >>> [f.code for f in findings(analyze(AdapterState({"h.0.fc": site})))]
        ['inert']
    """

    def blocks(holds: Callable[[BlockFigures], bool]) -> tuple[str, ...]:
        return tuple(block.name for block in analysis.blocks if holds(block))

    def rounded(form: str, holds: Callable[[Rounded], bool]) -> tuple[str, ...]:
        found = {name: site.rounded.get(form) for name, site in analysis.weights.items()}
        return tuple(name for name, left in found.items() if left is not None and holds(left))

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
