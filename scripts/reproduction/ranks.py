"""Stage `ranks`: how large a rank must be (section 7.2, Table 6)."""

from __future__ import annotations

from pathlib import Path

from . import trials
from .document import Claim, Section, table, verdict_above
from .lab import Lab
from .methods import RANKS, SITES_NAMED

PAPER = {
    "q": (68.8, 69.6, 70.5, 70.4, 70.0),
    "qv": (73.4, 73.3, 73.7, 73.8, 73.5),
    "qkvo": (74.1, 73.7, 74.0, 74.0, 73.9),
    "all": (),
}
DONE = tuple(f"lora-{sites}-r{rank}" for sites in ("all", "q", "qkvo") for rank in RANKS)
MARGIN = 0.01


def do(lab: Lab) -> None:
    """All ranks; those on q, v are of the stage `quality`."""
    trials.do(lab, DONE)


def section(lab: Lab, document: Path) -> Section | None:  # noqa: ARG001 - it has no picture
    """What came out."""
    rows, claims = [], []
    for sites, paper in PAPER.items():
        found = {rank: trials.scores(lab, f"lora-{sites}-r{rank}") for rank in RANKS}
        title = SITES_NAMED.get(sites, sites)
        if any(found.values()):
            cells = ["" if s is None else f"{100 * s.mean:.1f}" for s in found.values()]
            rows.append((title, *cells, " ".join(map(str, paper)) or "not in the paper"))
        known = [scores for scores in found.values() if scores is not None]
        if len(known) == len(RANKS):
            best = max(known[1:], key=lambda scores: scores.mean)
            gap = trials.gap(known[0], best)
            assert gap is not None
            theirs = f"WikiSQL {paper[0]} against {max(paper)}" if paper else "not in the paper"
            claims.append(
                Claim(
                    f"r = 1 on {title} is within a point of the best rank (Table 6)",
                    theirs,
                    f"{100 * known[0].mean:.1f} against {100 * best.mean:.1f} ({gap} points)",
                    verdict_above(gap.difference, gap.error, -MARGIN),
                )
            )
    if not claims:
        return None
    head = ("matrices", *(f"r = {rank}" for rank in RANKS), "WikiSQL (paper)")
    text = ["Mean accuracy in %; seeds and errors are as above.", table(head, rows)]
    note = (
        "The best rank is the best of these runs. So r = 1 is compared with the luckiest of five, "
        "and the claim is a little harder to meet."
    )
    return Section("How large a rank (Table 6)", claims, text, [note])
