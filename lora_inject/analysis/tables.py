"""The rows of an analysis: what the terminal prints and what the report shows, written once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from lora_inject.analysis.blocks import Place, by_kind
from lora_inject.analysis.comparison import Comparison
from lora_inject.analysis.figures import Analysis
from lora_inject.analysis.spectra import SHARES
from lora_inject.spec.names import templates


@dataclass(frozen=True)
class Rows:
    """A table of sites, a row each.

    Attributes:
        heads: Titles of the columns; the first column holds names.
        cells: The rows. Text and integers describe a site; floats, None and pairs of floats, a
            value and its error, are figures.
        choose: How some columns, by their titles, stand for many sites; others by the median.
    """

    heads: tuple[str, ...]
    cells: tuple[tuple[Any, ...], ...]
    choose: dict[str, Callable[[Iterable[float]], float]] = field(default_factory=dict)

    def text(self) -> list[tuple[str, ...]]:
        """Return the rows as they are shown."""
        return [tuple(map(_shown, row)) for row in self.cells]

    def by_kind(self) -> Rows:
        """Join the rows of one kind that differ in figures only: `h.{0..11}.fc x12`.

        Examples:
            >>> rows = Rows(("site", "rank", "|D|"), (("h.0.q", 4, 1.0), ("h.1.q", 4, 3.0)))
            >>> rows.by_kind().text()
            [('h.{0..1}.q x2', '4', '2')]
        """
        groups: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
        for row in self.cells:
            same = (cell for cell in row[1:] if isinstance(cell, str | int))
            groups.setdefault((_kind(str(row[0])), *same), []).append(row)
        return Rows(self.heads, tuple(map(self._joined, groups.values())))

    def _joined(self, rows: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
        if len(rows) == 1:
            return rows[0]
        columns: list[tuple[Any, ...]] = list(zip(*rows, strict=True))
        joined = (
            _one(column, self.choose.get(head, median))
            for head, column in zip(self.heads[1:], columns[1:], strict=True)
        )
        return f"{joined_name(columns[0])} x{len(rows)}", *joined


def joined_name(names: Sequence[str]) -> str:
    """Return one name for many of a kind: their template, or `*` where the numbers have gaps."""
    sites, labels = zip(*(name.partition(" [")[::2] for name in names), strict=True)
    found = list(templates(dict.fromkeys(sites)))
    name = found[0] if len(found) == 1 else _kind(sites[0])
    label = labels[0] if len(set(labels)) == 1 else _kind(names[0]).partition(" [")[2]
    return f"{name} [{label}" if label else name


def _kind(name: str) -> str:
    site, _, label = name.removesuffix("]").partition(" [")
    words = ("*" if word.isdecimal() else word for word in label.split())
    return Place(Place(site, "").kind, " ".join(words)).name


def _one(column: tuple[Any, ...], choose: Callable[[Iterable[float]], float]) -> Any:
    """Return what stands for a column of one kind."""
    if isinstance(column[0], str | int):
        return column[0]
    if isinstance(column[0], tuple):
        first, second = zip(*column, strict=True)
        return _of_finite(first, choose), _of_finite(second, choose)
    return _of_finite(column, choose)


def _of_finite(values: Iterable[float | None], choose: Callable[[Iterable[float]], float]) -> float:
    finite = [value for value in values if value is not None and not math.isnan(value)]
    return choose(finite) if finite else math.nan


def _shown(cell: Any) -> str:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, tuple):
        return f"{number(cell[0])} ({number(cell[1])})"
    return number(cell)


def number(value: float | None) -> str:
    """Return a number with three digits, whole numbers in full, `-` for none.

    Examples:
        >>> number(0.012345), number(1024.0), number(float("nan")), number(None)
        ('0.0123', '1,024', '-', '-')
    """
    if value is None or math.isnan(value):
        return "-"
    whole = math.isfinite(value) and abs(value) < 1e9 and value == int(value)
    return f"{int(value):,}" if whole else f"{value:.3g}"


def percent(share: float) -> str:
    """Return a share in percent: `0.99` as `99%`."""
    return f"{share * 100:.3g}%" if math.isfinite(share) else number(share)


def span(values: Iterable[float]) -> str:
    """Return the range of some numbers: `8`, or `4 to 16`."""
    ends = sorted(set(values))
    return "-" if not ends else f"{ends[0]:g}" + (f" to {ends[-1]:g}" if len(ends) > 1 else "")


def kind_rows(analysis: Analysis) -> Rows:
    """Say for each kind of site what rank it needed: the median, and the largest."""
    rows: list[tuple[Any, ...]] = []
    for kind, blocks in by_kind(analysis.blocks).items():
        needed = zip(*(b.spectrum.needed.values() for b in blocks), strict=True)
        rows.append(
            (
                kind,
                len(blocks),
                span(b.rank for b in blocks),
                *(f"{median(each):g} (max {max(each)})" for each in needed),
                median(b.spectrum.stable_rank for b in blocks),
                median(b.spectrum.effective_rank for b in blocks),
            )
        )
    heads = ("kind", "blocks", "rank", *map(percent, SHARES), "stable", "effective")
    return Rows(heads, tuple(rows))


def block_rows(analysis: Analysis) -> Rows:
    """Say for each block how large its delta is and what rank it needed."""
    rows = tuple(
        (
            b.name,
            b.rank,
            b.spectrum.norm,
            b.spectrum.first_share,
            b.spectrum.stable_rank,
            b.spectrum.effective_rank,
            *map(float, b.spectrum.needed.values()),
        )
        for b in analysis.blocks
    )
    heads = ("block", "rank", "|D|", "first", "stable", "effective", *map(percent, SHARES))
    return Rows(heads, rows)


def weight_rows(analysis: Analysis) -> Rows:
    """Say for each block how it compares with the weight that it updates."""
    rows = tuple(
        (
            Place(block.tensor, block.label).name,
            block.norms.weight_norm,
            block.norms.relative,
            block.norms.rank,
            block.norms.of_delta,
            block.norms.of_weight,
            block.norms.of_random_expected,
            block.norms.factor,
        )
        for block in analysis.on_weight()
    )
    heads = ("tensor", "|W|", "|D|/|W|", "r", "|U'WV|", "W's own", "random", "amplification")
    return Rows(heads, rows)


def rounding_rows(analysis: Analysis) -> Rows:
    """Say for each site what each format keeps of the delta, and its error."""
    found = analysis.weights
    formats = next(iter(found.values())).rounded if found else ()
    rows = tuple(
        (site, beside.stored, *((r.kept, r.error) for r in beside.rounded.values()))
        for site, beside in found.items()
    )
    return Rows(("kept (error) after merging in", "stored", *formats), rows)


def comparison_rows(compared: Comparison) -> Rows:
    """Say for each block of two adapters how far their subspaces agree."""
    rows = tuple(
        (
            pair.name,
            f"{pair.ranks[0]}, {pair.ranks[1]}",
            *(
                value
                for side in (pair.right, pair.left)
                for value in (side.first, side.whole, side.whole_by_chance)
            ),
        )
        for pair in compared.pairs
    )
    sides = (f"{side}: {what}" for side in "AB" for what in ("phi(1,1)", "whole", "chance"))
    return Rows(("block", "ranks", *sides), rows)
