"""A heat map of a model: a row for each kind of site, a cell for each layer.

A map is a list of cells with a place each; rows, columns and the scale follow from them.
Experts of one layer share a cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_inject.analysis.places import Place
from lora_inject.analysis.report.page import Html, card, element
from lora_inject.analysis.report.svg import strip
from lora_inject.analysis.report.wording import mean


@dataclass(frozen=True)
class Cell:
    """A figure of one block."""

    place: Place
    value: float
    name: str


def heat_map(
    title: str,
    cells: Sequence[Cell],
    show: Callable[[float], str],
    low: float | None = None,
    high: float | None = None,
) -> Html:
    """Draw one heat map; experts of one layer are one cell, their mean."""
    rows: dict[str, dict[tuple[int, ...], list[Cell]]] = {}
    for cell in cells:
        rows.setdefault(cell.place.kind, {}).setdefault(cell.place.position, []).append(cell)
    means = {
        kind: {at: (mean(c.value for c in group), group) for at, group in row.items()}
        for kind, row in rows.items()
    }
    values = [v for row in means.values() for v, _ in row.values() if math.isfinite(v)]
    bottom = min(values, default=0.0) if low is None else low
    top = max(values, default=1.0) if high is None else high
    positions = sorted({at for row in rows.values() for at in row})
    drawn: list[str] = []
    for kind, row in means.items():
        strips = [_described(row[at], show) if at in row else (math.nan, "") for at in positions]
        drawn += [kind_label(kind), Html(strip(strips, bottom, top, f"{title}, {kind}"))]
    return card(title, *drawn, _axis(positions), _scale(show(bottom), show(top)))


def _described(
    cell: tuple[float, Sequence[Cell]], show: Callable[[float], str]
) -> tuple[float, str]:
    value, group = cell
    also = f" and {len(group) - 1} more, mean" if len(group) > 1 else ""
    return value, f"{group[0].name}{also}: {show(value)}"


def kind_label(kind: str) -> Html:
    """Return a kind with its last part in bold."""
    path, dot, last = kind.rpartition(".")
    return element("div", f"{path}{dot}", element("b", last), class_="kind")


def _axis(positions: Sequence[tuple[int, ...]]) -> Html:
    ends = [positions[0], positions[len(positions) // 2], positions[-1]]
    shown = ends if len(positions) > 2 else positions
    texts = [".".join(map(str, at)) or "-" for at in shown]
    return element("div", *(element("span", text) for text in texts), class_="axis")


def _scale(low: str, high: str) -> Html:
    cells = [(i / 15, "") for i in range(16)]
    colours = Html(strip(cells, 0, 1, "scale of colour").replace(' class="strip"', "", 1))
    return element("div", element("span", low), colours, element("span", high), class_="scale")
