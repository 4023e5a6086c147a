"""Stage `rivals`: LoRA compared with the other ways to train less than everything (section 5)."""

from __future__ import annotations

from pathlib import Path

from . import trials
from .document import FAILS, HOLDS, OPEN, Claim, Section, table, verdict_above
from .lab import Lab

OURS = "lora-qv-r8"
RIVALS = ("adapter-h", "adapter-l", "prefix", "bitfit", "top2", "head")


def do(lab: Lab) -> None:
    """The rivals, each tuned by a grid of its own, and LoRA at the same budget."""
    trials.do(lab, (OURS, *RIVALS))


def section(lab: Lab, document: Path) -> Section | None:  # noqa: ARG001 - it has no picture
    """What came out."""
    ours = trials.scores(lab, OURS)
    found = [scores for name in RIVALS if (scores := trials.scores(lab, name))]
    if ours is None or len(found) < len(RIVALS):
        return None
    rows: list[tuple[str, ...]] = []
    verdicts: list[str] = []
    for scores in found:
        gap = trials.gap(ours, scores)
        assert gap is not None  # both have the first seed
        verdicts.append(verdict_above(gap.difference, gap.error))
        rows.append(
            (
                scores.method.title,
                f"{scores.middle('parameters'):,.0f}",
                f"{100 * scores.mean:.1f}",
                str(gap),
                verdicts[-1],
            )
        )
    verdict = FAILS if FAILS in verdicts else OPEN if OPEN in verdicts else HOLDS
    claim = Claim(
        "LoRA is ahead of the other ways to train less than everything",
        "in most columns of Tables 2 to 4",
        "q, v at r = 8 is ahead, in points, of "
        + "; ".join(f"{title} {ahead}" for title, _, _, ahead, _ in rows),
        verdict,
    )
    text = [
        (
            f"{ours.method.title}: {ours.middle('parameters'):,.0f} parameters, "
            f"{100 * ours.mean:.1f} %. The sizes of adapter layers and the prefix were "
            "chosen to have about as many. *LoRA ahead* is in points, ± one standard error:"
        ),
        table(("method", "parameters", "accuracy, %", "LoRA ahead", "ahead at all"), rows),
    ]
    return Section("Compared with other ways to train little (section 5)", [claim], text)
