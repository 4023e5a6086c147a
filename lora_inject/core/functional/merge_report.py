"""What a merge did: one report, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_inject.core.spec.tables import Figures, Listing, ListReport, Shown, wrapped

FEW = 10
"""So many tensors are printed each in a line of its own."""
NOTHING = 5e-5
"""A share of a delta below this prints as 0.0000."""


@dataclass(frozen=True)
class TensorReport(Figures):
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


@dataclass(frozen=True, repr=False)
class MergeReport(Shown, ListReport):
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
        zero = [t.name for t in self.counted if t.relative == 0]
        losses = []
        if self.inert:
            losses.append(f"rounding left 0.0000 of {self._where(self.inert)}")
        if zero:
            losses.append(f"{self._where(zero)} is 0, as before training")
        return f"{'; '.join(losses)}: there the adapter has no effect" if losses else None

    def _where(self, names: Sequence[str]) -> str:
        of = "every delta" if len(names) == len(self.counted) else "the delta"
        return f"{of} at {len(names)} of {len(self.counted)} tensors, such as '{names[0]}'"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        data = {**self.__dict__, "notes": list(self.notes), "inert": list(self.inert)}
        data["tensors"] = [tensor.to_dict() for tensor in self.tensors.values()]
        data["adapters"] = [list(row) for row in self.adapters]
        return {**data, "warning": self.warning}

    def _lines(self, width: int, *, everything: bool) -> Iterator[str]:
        """Yield what is left of each delta, the worst of each kind, and the totals."""
        heads = ("tensor", "action", "dtype", "|D|/|W|", "kept", "error")
        cells = [(t.name, t.action, t.dtype, t.relative, t.kept, t.error) for t in self.counted]
        rows = Listing(heads, tuple(cells), {"kept": min, "error": max})
        joined = "Of several: the median |D|/|W| and the worst of the others."
        yield from rows.lines(width, everything=everything, joined=joined)
        for sentence in (*(f"note: {note}" for note in self.notes), self.totals()):
            yield from wrapped(sentence, width)

    def totals(self) -> str:
        """Return what was merged into what, with what must not be overlooked."""
        mix = ", ".join(f"{name} x {weight:g}" for name, weight in self.adapters)
        lost = f"; {self.warning}" if self.warning else ""
        return f"merged {mix} into {len(self.tensors):,} tensors{lost}"

    def __str__(self) -> str:
        return self.text(everything=len(self.counted) <= FEW)
