"""What in an analysis deserves attention: inert sites, lost deltas, ranks that are not used.

A finding is a rule with a threshold that is stated here, the sentence that a reader gets,
and the names it holds for. The figures behind it are in the analysis; nothing is changed or
refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lora_inject.analysis.figures import Analysis, BlockFigures
from lora_inject.analysis.places import full_name
from lora_inject.analysis.rounding import Rounded

ONE_DIRECTION = 0.99
"""Share of the energy in the first direction from which a block counts as having only one."""
SPARE = 2
"""A rank is larger than needed where 99% of the energy fits into the rank over this."""
LEAST_KEPT = 0.9
"""Share of a delta that must survive rounding."""
LOUD = 1.0
"""`|D| / |W|` from which a delta outweighs its weight."""


@dataclass(frozen=True)
class Finding:
    """One thing to know.

    Attributes:
        code: Its rule: `inert`, `one-direction`, `spare-rank`, `lost`, `noise`, `overflow`, `loud`.
        text: What it means.
        names: The sites or blocks that it holds for.
    """

    code: str
    text: str
    names: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**asdict(self), "names": list(self.names)}


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
        >>> from lora_inject.adapter.state import AdapterState, SiteState
        >>> spec = SiteSpec("h.0.fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> site = SiteState(spec, torch.eye(2, 4), torch.zeros(6, 2))
        >>> [f.code for f in findings(analyze(AdapterState({"h.0.fc": site})))]
        ['inert']
    """
    rules = (_inert, _loud, _overflow, _lost, _noise, _one_direction, _spare_rank)
    found = (rule(analysis) for rule in rules)
    return tuple(finding for finding in found if finding.names)


def _inert(analysis: Analysis) -> Finding:
    text = "The delta is zero: B is, or it equals its frozen start. The site does nothing."
    return Finding("inert", text, _blocks(analysis, lambda b: not b.spectrum.rank))


def _loud(analysis: Analysis) -> Finding:
    text = (
        "The delta outweighs the weight (|D| > |W|). Training may have diverged, or the scale is "
        "not the one it was trained with."
    )
    names = (
        full_name(site, block.label)
        for site, _, block in analysis.on_weight
        if block.norms.relative > LOUD
    )
    return Finding("loud", text, tuple(dict.fromkeys(names)))


def _overflow(analysis: Analysis) -> Finding:
    text = "The merged weight does not fit into float16."
    return Finding("overflow", text, _sites(analysis, "float16", lambda r: math.isnan(r.kept)))


def _lost(analysis: Analysis) -> Finding:
    text = (
        f"Merged in bfloat16, less than {LEAST_KEPT * 100:.0f}% of the delta survives rounding. "
        "Keep the adapter apart, or merge in float32."
    )
    names = _sites(analysis, "bfloat16", lambda r: r.kept < LEAST_KEPT)
    return Finding("lost", text, names)


def _noise(analysis: Analysis) -> Finding:
    text = "Merged in bfloat16, rounding changes the weight by more than the delta (error above 1)."
    names = _sites(analysis, "bfloat16", lambda r: r.kept >= LEAST_KEPT and r.error > 1)
    return Finding("noise", text, names)


def _one_direction(analysis: Analysis) -> Finding:
    text = f"One direction holds {ONE_DIRECTION * 100:.0f}% of the energy or more: rank 1 would do."
    return Finding("one-direction", text, _blocks(analysis, _is_one_direction))


def _spare_rank(analysis: Analysis) -> Finding:
    text = f"99% of the energy fits into 1/{SPARE} of the rank or less."

    def holds(block: BlockFigures) -> bool:
        needed = block.spectrum.rank_for(0.99)
        return not _is_one_direction(block) and 0 < needed * SPARE <= block.rank

    return Finding("spare-rank", text, _blocks(analysis, holds))


def _is_one_direction(block: BlockFigures) -> bool:
    return block.rank > 1 and block.first_share >= ONE_DIRECTION


def _blocks(analysis: Analysis, holds: Callable[[BlockFigures], bool]) -> tuple[str, ...]:
    return tuple(block.name for block in analysis.blocks if holds(block))


def _sites(analysis: Analysis, form: str, holds: Callable[[Rounded], bool]) -> tuple[str, ...]:
    return tuple(
        site
        for site, found in analysis.weights.items()
        if form in found.rounded and holds(found.rounded[form])
    )
