"""What a merge did: one report, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lora_inject.core.spec.tables import Shown

NOTHING = 5e-5
"""A share of a delta below this prints as 0.0000."""


@dataclass(frozen=True)
class TensorReport:
    """What became of one merged tensor.

    Attributes:
        name: The tensor.
        action: `folded`, `replaced`, `added`, `untied`, `cast` or `dequantized`.
        dtype: Its dtype after the merge, such as `bfloat16`.
        shape: Its dimensions after the merge.
        sites: The adapters' sites and tensors that went into it.
        relative: `|D| / |W|`, Frobenius norms of delta and weight; None where nothing was counted.
        kept: `<W_merged - W, D> / <D, D>`: 1 where the delta survived rounding, 0 where it was
            rounded away; None where nothing was counted.
        error: `|W_merged - W - D| / |D|`; None where nothing was counted.
    """

    name: str
    action: str
    dtype: str
    shape: tuple[int, ...]
    sites: tuple[str, ...] = ()
    relative: float | None = None
    kept: float | None = None
    error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**asdict(self), "shape": list(self.shape), "sites": list(self.sites)}


@dataclass(frozen=True, repr=False)
class MergeReport(Shown):
    """What a merge did.

    Attributes:
        adapters: `(name, weight)` of each adapter that was folded in.
        tensors: Every tensor that was computed, by name. On a live model only tensors that are
            stored in 16 bits are counted, as wider ones keep all of a delta.
        n_tensors: Tensors written.
        notes: What a reader should know.
    """

    adapters: tuple[tuple[str, float], ...]
    tensors: Mapping[str, TensorReport] = field(default_factory=dict)
    n_tensors: int = 0
    notes: tuple[str, ...] = ()

    @property
    def counted(self) -> tuple[TensorReport, ...]:
        """The tensors of whose delta is known what rounding left, the least kept first."""
        known = [t for t in self.tensors.values() if t.kept is not None]
        return tuple(sorted(known, key=lambda t: t.kept or 0.0))

    @property
    def min_kept(self) -> float:
        """The smallest `kept`; 1 where nothing was counted."""
        return next((t.kept for t in self.counted if t.kept is not None), 1.0)

    @property
    def inert(self) -> tuple[str, ...]:
        """Names of tensors whose whole delta was rounded away."""
        return tuple(t.name for t in self.counted if t.kept is not None and t.kept < NOTHING)

    @property
    def warning(self) -> str | None:
        """What must not be overlooked: deltas that are 0, or of which rounding left nothing."""
        return merge_warning(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        data = {**self.__dict__, "notes": list(self.notes), "inert": list(self.inert)}
        data["tensors"] = [tensor.to_dict() for tensor in self.tensors.values()]
        data["adapters"] = [list(row) for row in self.adapters]
        return {**data, "warning": self.warning}

    def __str__(self) -> str:
        return merge_table(self)


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
