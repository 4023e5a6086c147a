"""Results as plain data and as lines: tables of sites, whose rows of one kind are joined."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from html import escape
from statistics import median
from typing import Any

from lora_inject.core.spec.names import printable, templates

MOST_NAMES = 6
"""Names that a list shows unless all are asked for."""


@dataclass(frozen=True)
class Listing:
    """A table of sites, a row each.

    Text and integers describe a site; floats, None and pairs of floats, a value and its error, are
    figures.
    """

    heads: tuple[str, ...]  # titles of the columns; the first column holds names
    cells: tuple[tuple[Any, ...], ...]
    # functions that summarize figures of many sites, by column title; others use the median
    choose: dict[str, Callable[[Iterable[float]], float | str]] = field(default_factory=dict)

    def text(self) -> list[tuple[str, ...]]:
        """Return the rows as text."""
        return [tuple(map(_shown, row)) for row in self.cells]

    def by_kind(self) -> Listing:
        """Join the rows of one kind that differ only in figures: `h.{0..11}.fc x12`.

        Examples:
            >>> rows = Listing(("site", "rank", "|D|"), (("h.0.q", 4, 1.0), ("h.1.q", 4, 3.0)))
            >>> rows.by_kind().text()
            [('h.{0..1}.q x2', '4', '2')]
        """
        groups: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
        for row in self.cells:
            same = (cell for cell in row[1:] if isinstance(cell, str | int))
            groups.setdefault((kind_of(str(row[0])), *same), []).append(row)
        return Listing(self.heads, tuple(map(self._joined, groups.values())))

    def lines(self, width: int, *, everything: bool = False, joined: str = "") -> Iterator[str]:
        """Yield the table, rows of one kind in one line unless `everything`; nothing if empty.

        `joined` states how figures of several sites are summarized.
        """
        if not self.cells:
            return
        table = self if everything else self.by_kind()
        n_left = 1 + sum(isinstance(cell, str) for cell in table.cells[0][1:])
        shown = [[printable(cell) for cell in row] for row in (table.heads, *table.text())]
        yield from columns(shown, n_left, width, "")
        if joined and len(table.cells) < len(self.cells):
            yield from wrapped(joined, width)

    def _joined(self, rows: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
        if len(rows) == 1:
            return rows[0]
        names, *columns = zip(*rows, strict=True)
        heads = self.heads[1:]
        joined = (_one(c, self.choose.get(h, median)) for h, c in zip(heads, columns, strict=True))
        return f"{joined_name(names)} x{len(rows)}", *joined


def joined_name(names: Sequence[str]) -> str:
    """Return one name for many of a kind: their template, or `*` where the numbers have gaps."""
    sites, labels = zip(*(name.partition(" [")[::2] for name in names), strict=True)
    joint = list(templates(dict.fromkeys(sites)))
    name = joint[0] if len(joint) == 1 else kind_of(sites[0])
    label = labels[0] if len(set(labels)) == 1 else kind_of(names[0]).partition(" [")[2]
    return f"{name} [{label}" if label else name


def kind_of(name: str) -> str:
    """Return a name with `*` for each number, in its label too: `h.*.up [expert * q]`."""
    return re.sub(r"(?<![^. \[])\d+(?![^. \]])", "*", name)


def _one(column: tuple[Any, ...], choose: Callable[[Iterable[float]], float | str]) -> Any:
    """Return the summary of a column of one kind."""
    if isinstance(column[0], tuple):
        return tuple(_of_finite(values, choose) for values in zip(*column, strict=True))
    return column[0] if isinstance(column[0], str | int) else _of_finite(column, choose)


def _of_finite(
    values: Iterable[float | None], choose: Callable[[Iterable[float]], float | str]
) -> float | str:
    finite = [value for value in values if value is not None and not math.isnan(value)]
    return choose(finite) if finite else math.nan


def _shown(cell: Any) -> str:
    if isinstance(cell, tuple):
        return f"{number(cell[0])} ({number(cell[1])})"
    return cell if isinstance(cell, str) else number(cell)


def span(values: Iterable[float]) -> str:
    """Return the range of some numbers.

    Examples:
        >>> span([8, 8]), span([16, 4, 8])
        ('8', '4 to 16')
    """
    ends = sorted(set(values))
    return "-" if not ends else f"{ends[0]:g}" + (f" to {ends[-1]:g}" if len(ends) > 1 else "")


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


def columns(
    rows: Sequence[Sequence[str]], n_left: int, width: int, indent: str = "  "
) -> Iterator[str]:
    """Yield rows with aligned columns; if they do not fit, each name is on a separate line.

    The first cell of a row is a name; the first `n_left` columns are aligned to the left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    apart = len(indent) + sum(widths) + 2 * (len(widths) - 1) > width
    for row in rows:
        name, *cells = (
            cell.ljust(size) if i < n_left else cell.rjust(size)
            for i, (cell, size) in enumerate(zip(row, widths, strict=True))
        )
        if apart:
            yield indent + row[0]
            name = ""
        yield f"{indent}{'  '.join([name, *cells])}".rstrip()


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Return a sentence in lines that fit; words, which may be paths, are not broken."""
    return textwrap.wrap(
        printable(text),
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def listed(head: str, names: Iterable[str], width: int, *, everything: bool) -> Iterator[str]:
    """Yield names, if any, in lines that fit, below each other; a few unless `everything`."""
    shown = [printable(name) for name in names]
    if not shown:
        return
    if not everything and len(shown) > MOST_NAMES:
        shown[MOST_NAMES:] = [f"and {len(shown) - MOST_NAMES:,} more (--all)"]
    line = head
    for i, name in enumerate(shown):
        item = name + "," * (i + 1 < len(shown))
        if len(line) + len(item) >= width and line != head:
            yield line
            line = " " * len(head)
        line += f" {item}"
    yield line


def in_bytes(n: int) -> str:
    """Return bytes with a unit: `512 bytes`, `538.1 MB`."""
    from rich.filesize import decimal

    return decimal(n)


def sides(shape: Iterable[int]) -> str:
    """Return a shape as `2 x 1,024`."""
    return " x ".join(f"{side:,}" for side in shape) or "scalar"


class Figures:
    """A dataclass of figures: its fields are what was computed, its properties what follows."""

    def to_dict(self) -> dict[str, Any]:
        """Return fields and properties as plain data."""
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        for cls in reversed(type(self).__mro__):
            names += [name for name, value in vars(cls).items() if isinstance(value, property)]
        return {name: _plain(getattr(self, name)) for name in names if name[0] != "_"}


def _plain(value: Any) -> Any:
    if isinstance(value, Figures):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value  # a tensor


class Report(Figures):
    """What a function found or did: figures for programs, and lines for people."""

    def text(self, width: int = 80) -> str:
        """Return it in lines that fit."""
        return "\n".join(self._lines(width))

    def _lines(self, width: int) -> Iterable[str]:
        raise NotImplementedError


class ListReport(Figures):
    """A report on many sites, of which those of one kind share a line unless all are asked for."""

    def text(self, width: int = 80, *, everything: bool = False) -> str:
        """Return it in lines that fit; what there is much of is joined unless `everything`."""
        return "\n".join(self._lines(width, everything=everything))

    def _lines(self, width: int, *, everything: bool) -> Iterable[str]:
        raise NotImplementedError


class Shown:
    """A value whose `repr` is what `print` shows; in a notebook it keeps its columns."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """Return the text for a notebook, which would set it in a proportional font otherwise."""
        return f"<pre>{escape(str(self))}</pre>"
