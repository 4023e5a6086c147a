"""Stage `matrices`: which matrices to adapt under one budget (section 7.1, Table 5)."""

from __future__ import annotations

from pathlib import Path

from . import trials
from .document import Claim, Section, table, verdict_above
from .lab import Lab

COLUMNS = {
    "lora-q-r8": (70.4, 91.0),
    "lora-k-r8": (70.0, 90.8),
    "lora-v-r8": (73.0, 91.0),
    "lora-o-r8": (73.2, 91.3),
    "lora-qk-r4": (71.4, 91.3),
    "lora-qv-r4": (73.7, 91.3),
    "lora-qkvo-r2": (73.7, 91.7),
}


def do(lab: Lab) -> None:
    """The seven columns."""
    trials.do(lab, tuple(COLUMNS))


def section(lab: Lab, document: Path) -> Section | None:  # noqa: ARG001 - it has no picture
    """What came out."""
    found = {name: scores for name in COLUMNS if (scores := trials.scores(lab, name))}
    if len(found) < len(COLUMNS):
        return None
    rows = [
        (
            scores.method.title,
            f"{scores.middle('parameters'):,.0f}",
            *COLUMNS[name],
            f"{100 * scores.mean:.1f}",
            f"{100 * (scores.deviation or 0):.1f}",
            len(scores.results),
        )
        for name, scores in found.items()
    ]
    head = ("matrices", "parameters", "WikiSQL (paper)", "MNLI (paper)")
    claims = [
        _claim(found, "lora-qv-r4", "lora-q-r8", "q and v together beat q alone"),
        _claim(found, "lora-qv-r4", "lora-qk-r4", "q and v beat q and k"),
        _claim(found, "lora-v-r8", "lora-q-r8", "v alone beats q alone"),
        _claim(
            found,
            "lora-qkvo-r2",
            "lora-qv-r4",
            "all four at r = 2 are at least as good as q, v",
            -0.01,
        ),
    ]
    text = [
        "Every row has the same budget. Sentences, training and errors are as above.",
        table((*head, "accuracy here, %", "deviation", "seeds"), rows),
    ]
    return Section("Which matrices, under one budget (Table 5)", claims, text)


def _claim(
    found: dict[str, trials.Scores], one: str, other: str, claim: str, bound: float = 0.0
) -> Claim:
    gap = trials.gap(found[one], found[other])
    assert gap is not None  # every row has the first seed
    ours, theirs = COLUMNS[one], COLUMNS[other]
    return Claim(
        f"{claim} (Table 5)",
        f"WikiSQL {ours[0]} against {theirs[0]}, MNLI {ours[1]} against {theirs[1]}",
        f"{100 * found[one].mean:.1f} against {100 * found[other].mean:.1f} ({gap} points)",
        verdict_above(gap.difference, gap.error, bound),
    )
