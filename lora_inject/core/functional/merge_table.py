"""A `MergeReport` as text: the table that it prints, and its warning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def merge_table(report: Any) -> str:
    """Return what was merged, the tensors of which the least was kept first."""
    mix = ", ".join(f"{name} x {weight:g}" for name, weight in report.adapters)
    lines = [f"merged {mix} into {len(report.tensors)} tensors"]
    if report.counted:
        lines.append("   |D|/|W|     kept    error  tensor (least kept first)")
    for t in report.counted[:10]:
        relative, kept, error = (
            math.inf if v is None else v for v in (t.relative, t.kept, t.error)
        )
        lines.append(f"{relative:10.2e} {kept:8.3f} {error:8.3f}  {t.name}")
    last = [report.warning] if report.warning else []
    return "\n".join([*lines, *report.notes, *last])


def merge_warning(report: Any) -> str | None:
    """Return what must not be overlooked: deltas that are 0, or of which rounding left nothing."""
    zero = [t.name for t in report.counted if t.relative == 0]
    losses = []
    if report.inert:
        losses.append(f"rounding left 0.0000 of {_where(report, report.inert)}")
    if zero:
        losses.append(f"{_where(report, zero)} is 0, as before training")
    return f"{'; '.join(losses)}: there the adapter has no effect" if losses else None


def _where(report: Any, names: Sequence[str]) -> str:
    of = "every delta" if len(names) == len(report.counted) else "the delta"
    return f"{of} at {len(names)} of {len(report.counted)} tensors, such as '{names[0]}'"
