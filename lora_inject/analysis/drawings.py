"""Drawings of an analysis: figures of matplotlib, as SVG inside the report and as PNG files.

Phi is shown as in the paper's figures 3, 4 and 6 to 8: heat maps with i downwards and j to the
right, the first at the top left. In the page, text stays text in the color of the page. Each value
that a drawing shows by color is also in one of the report's tables.
"""

from __future__ import annotations

import importlib.util
import io
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_inject.analysis.blocks import Place
from lora_inject.core.spec.words import printable
from lora_inject.errors import StateError, user_path

COLORS = "viridis"
LINES = (0.4, 0.85)  # of the color scale for lines: its ends are lost on black and on white
WIDTH = 5.0  # inches: 360 units of SVG, so that text keeps its size on a narrow screen
LEFT, RIGHT, TOP = 0.1, 0.18, 0.04  # inches around a heat map
ROW, FOOT = 0.25, 0.8  # inches: one row of a heat map, its axis and legend
CHAR = 0.088  # inches: a character of a label, at least
PANEL = 2.6  # inches: side of a panel of phi
MOST_TICKS = 10
FEW = 5  # lines that a legend names where there are many
MANY = 100  # points of a line from which they are not marked
SMALL = 8.5  # points
INK = "#010203"  # stands for the page's own color of text
# Fonts that a browser may find; text is measured with the one that matplotlib brings.
FONT = "DejaVu Sans, Verdana, sans-serif"
INKED = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
STYLE: Any = {
    **dict.fromkeys(INKED, INK),
    "font.size": 9.5,
    "legend.frameon": False,
    "axes.linewidth": 0.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "lora_inject",  # equal figures give equal files
    "text.parse_math": False,  # a name may hold dollars
}
T = TypeVar("T")


def need_matplotlib() -> None:
    """Raise an error before a long computation if matplotlib is missing.

    Raises:
        StateError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        remedy = "Run pip install matplotlib jinja2"
        raise StateError("draw a picture", "matplotlib is not installed", remedy)


@contextmanager
def _styled() -> Iterator[None]:
    """Draw or write in the style above, not in the user's."""
    need_matplotlib()
    import matplotlib as mpl

    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has other fonts
        yield


# ------------------------------------------------------------------------------------ for the user


def draw_similarity(
    grids: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    labels: tuple[str, str] = ("i", "j"),
    zoom: bool = False,
    baseline: Tensor | None = None,
    title: str = "",
) -> Path:
    """Draw phi as in the paper: of two ranks, of two seeds, or of a delta and W.

    Args:
        grids: Title, such as `q, layer 48`, to `(r1, r2)` of phi.
        path: The PNG to write.
        labels: Of the rows and of the columns, such as `("i (r=8)", "j (r=64)")`.
        zoom: Beside each grid its corner where j <= i, as in figures 3 and 6.
        baseline: Phi of random matrices, drawn as the last panel, as in figures 4, 7 and 8.
        title: Above all.

    Returns:
        The path.

    Raises:
        StateError: matplotlib is not installed, or there is nothing to draw.
    """
    panels = list(grids.items())
    if zoom:
        panels = [each for name, grid in panels
                  for each in ((name, grid), (f"{name}, zoomed", _corner(grid)))]  # fmt: skip
    if baseline is not None:
        panels.append(("random", baseline))
    return png(similarity_figure(panels, labels, 2 if zoom else 3, title), path)


def draw_spectra(spectra: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Draw singular values, each set over its largest, on a logarithmic scale.

    Args:
        spectra: Name to `(n,)` singular values, decreasing.
        path: The PNG to write.

    Returns:
        The path.

    Raises:
        StateError: matplotlib is not installed, or there is nothing to draw.
    """
    _check_drawable(any(bool((values > 0).any()) for values in spectra.values()))
    return png(spectra_figure(list(spectra.items()), "site", len(spectra)), path)


def _corner(grid: Tensor) -> Tensor:
    """Return `(n, n)`, n the smaller side, of a grid: blank where j > i, as the paper zooms."""
    n = min(grid.shape)
    upper = torch.ones(n, n, dtype=torch.bool, device="cpu").triu(1)
    return grid[:n, :n].detach().cpu().masked_fill(upper, math.nan)


@_styled()
def png(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Write a figure into a file, folders made as needed."""
    place = user_path("draw", path)
    place.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(place, format="png", dpi=150)
    return place


@_styled()
def svg(figure: Any, about: str) -> str:
    """Return a figure as an `<svg>` element with a label for screen readers."""
    from markupsafe import escape

    written = io.StringIO()
    without = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(written, format="svg", transparent=True, metadata=without)
    text = written.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # the same in every drawing of the page
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", rf"font: \1px {FONT}", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(printable(about))}"', 1)


# ----------------------------------------------------------------------------------------- figures


@_styled()
def similarity_figure(
    panels: Sequence[tuple[str, Tensor]],
    labels: tuple[str, str] = ("i", "j"),
    columns: int = 3,
    title: str = "",
    side: float = PANEL,
    counted: Sequence[str] = (),
) -> Any:
    """Return heat maps of phi, titled grids in rows of `columns`, on one scale from 0 to 1.

    `counted` names the rows and columns; without it directions are counted from 1.
    """
    _check_drawable(any(grid.numel() for _, grid in panels))
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(side * rows, side * columns + 0.8, "constrained")
    table = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axes in table.flat:
        axes.set_axis_off()
    for axes, (name, grid) in zip(table.flat, panels, strict=False):
        axes.set_title(printable(name), fontsize=8)
        if not grid.numel():
            continue
        axes.set_axis_on()
        height, width = grid.shape
        image = axes.imshow(
            grid.detach().cpu().tolist(), vmin=0, vmax=1, cmap=COLORS, aspect="auto",
            interpolation="nearest", extent=(0.5, width + 0.5, height + 0.5, 0.5),
        )  # fmt: skip
        axes.set_xticks(*_ticks(width, counted))
        axes.set_yticks(*_ticks(height, counted))
        axes.tick_params(labelsize=6)
        axes.set_ylabel(labels[0], fontsize=7)
        axes.set_xlabel(labels[1], fontsize=7)
    bar = figure.colorbar(image, ax=table, label="\u03c6(i, j)", fraction=0.03, aspect=30)
    bar.solids.set_rasterized(True)
    if title:
        figure.suptitle(printable(title), fontsize=9)
    return figure


def _ticks(n: int, counted: Sequence[str]) -> tuple[range, list[str]]:
    """Return which of n rows, from 1, have a tick, and what it says."""
    at = range(1, n + 1, -(-n // MOST_TICKS))
    return at, [counted[i - 1] if counted else str(i) for i in at]


@_styled()
def heat_map(cells: Iterable[tuple[Place, float]], high: float | None = None) -> Any:
    """Return a row for each kind of site and a column for each layer, from 0 to `high`.

    Experts of one layer share a square, with their mean; `high` is the largest value by default.
    """
    groups: dict[str, dict[tuple[int, ...], list[float]]] = {}
    for place, value in cells:
        groups.setdefault(place.kind, {}).setdefault(place.position, []).append(value)
    positions = sorted({at for row in groups.values() for at in row})
    grid = [[_mean(row.get(at, ())) for at in positions] for row in groups.values()]
    labels = _short(groups)
    height = ROW * len(grid) + FOOT + TOP
    figure = _figure(height, WIDTH)
    left = min(0.6 * WIDTH, LEFT + CHAR * max(map(len, labels)))
    across = WIDTH - left - RIGHT

    def box(bottom: float, tall: float) -> Any:
        return figure.add_axes((left / WIDTH, bottom / height, across / WIDTH, tall / height))

    axes = box(FOOT, ROW * len(grid))
    image = axes.imshow(grid, vmin=0.0, vmax=high, cmap=COLORS, aspect="auto",
                        interpolation="none")  # fmt: skip
    axes.set_yticks(range(len(labels)), labels)
    shown = range(0, len(positions), -(-len(positions) // MOST_TICKS))
    axes.set_xticks(shown, [".".join(map(str, positions[i])) or "-" for i in shown])
    axes.set_xlabel("layer", labelpad=1)
    axes.tick_params(length=2)
    bar = figure.colorbar(image, cax=box(0.22, 0.1), orientation="horizontal")
    bar.solids.set_rasterized(True)
    bar.outline.set_visible(False)
    bar.ax.locator_params(nbins=5)
    bar.ax.tick_params(length=2)
    return figure


@_styled()
def spectra_figure(lines: Sequence[tuple[str, Tensor]], named: str, most: int = FEW) -> Any:
    """Return singular values over the largest of each, a line for each label.

    The legend, titled `named`, names up to `most` of them, evenly spaced.
    """
    positive = ((label, values[values > 0].tolist()) for label, values in lines)
    drawn = [(label, values) for label, values in positive if values]
    below = any(len(label) > FEW for label, _ in drawn)
    figure, axes = _one_plot(2.2 + 0.3 * len(drawn) * below)
    in_legend = set(evenly_spaced(range(len(drawn)), most))
    for number, (label, values) in enumerate(drawn):
        relative = [value / values[0] for value in values]
        text = printable(label) if number in in_legend else None
        axes.semilogy(range(1, len(values) + 1), relative, marker=".", ms=3, lw=0.9,
                      color=_shade(number, len(drawn)), label=text)  # fmt: skip
    _plain_axes(axes, "direction", "singular value / largest")
    if drawn:
        _label_decades(axes.yaxis)
        where = "outside lower left" if below else "outside right upper"
        figure.legend(title=named, fontsize=SMALL, title_fontsize=SMALL, loc=where)
    return figure


@_styled()
def lines_figure(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x: str,
    y: str,
    *,
    logarithmic: bool = False,
    bottom: float | None = None,
    among: Iterable[str] = (),
) -> Any:
    """Return points by name, joined by a line each.

    The x axis may be logarithmic; the y axis begins at `bottom`, by default below the least value.
    Figures whose names are `among` the same names give a name the same color and mark.
    """
    figure, axes = _one_plot(2.6 + 0.16 * len(lines))
    names = list(among) or list(lines)
    for label, points in lines.items():
        number = names.index(label)
        look = {"marker": "os^Dv"[number % 5] if len(points) < MANY else "", "ms": 3, "lw": 0.9}
        color = _shade(number, len(names))
        axes.plot(*zip(*points, strict=True), **look, color=color, label=printable(label))
    _plain_axes(axes, x, y)
    axes.set_ylim(bottom=bottom)
    if logarithmic:
        axes.set_xscale("log")
        _label_decades(axes.xaxis)
    figure.legend(fontsize=SMALL, loc="outside lower left", ncols=2)
    return figure


@_styled()
def ranks_figure(ranks: Sequence[int]) -> Any:
    """Return how many blocks need which rank."""
    figure, axes = _one_plot(1.9)
    counts = [ranks.count(rank) for rank in range(max(ranks) + 1)]
    bars = axes.bar(range(len(counts)), counts, color=_shade(2, 5))
    if len(counts) <= 24:
        axes.bar_label(bars, labels=[str(n) if n else "" for n in counts], fontsize=SMALL)
    _plain_axes(axes, "rank that holds 99%", "blocks")
    axes.yaxis.get_major_locator().set_params(integer=True)
    return figure


# ------------------------------------------------------------------------------------------- parts


def evenly_spaced(items: Sequence[T], most: int = 4) -> list[T]:
    """Take up to `most` items, evenly spaced from the first to the last.

    Examples:
        >>> evenly_spaced(range(96)), evenly_spaced("ab")
        ([0, 31, 63, 95], ['a', 'b'])
    """
    n = min(most, len(items))
    return [items[i * (len(items) - 1) // max(1, n - 1)] for i in range(n)]


def shared_prefix(kinds: Iterable[str]) -> str:
    """Return the segments with which all kinds begin: `model.layers.*.`, or nothing.

    Examples:
        >>> shared_prefix(["h.*.attn.q", "h.*.mlp.up"]), shared_prefix(["fc"]), shared_prefix([])
        ('h.*.', '', '')
    """
    columns = zip(*(kind.split(" ")[0].split(".")[:-1] for kind in kinds), strict=False)
    shared = takewhile(lambda column: len(set(column)) == 1, columns)
    return "".join(f"{column[0]}." for column in shared)


def _short(kinds: Iterable[str]) -> list[str]:
    prefix = shared_prefix(kinds)
    return [printable(kind.removeprefix(prefix)) for kind in kinds]


def _figure(height: float, width: float, layout: Any = None) -> Any:
    """Return an empty figure that belongs to no window and no global state; sides in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _one_plot(height: float) -> tuple[Any, Any]:
    """Return a figure as wide as the page, and its only axes."""
    figure = _figure(height, WIDTH, "constrained")
    return figure, figure.subplots()


def _label_decades(axis: Any) -> None:
    """Label 1 and 3 of each decade of a logarithmic axis, without powers."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter("")


def _check_drawable(drawable: bool) -> None:
    if not drawable:
        problem = "there is nothing to draw: no directions, no values"
        remedy = "An adapter whose B is zero has none; train it first"
        raise StateError("draw a picture", problem, remedy)


def _shade(line: int, n: int) -> Any:
    import matplotlib as mpl

    first, last = LINES
    return mpl.colormaps[COLORS](first + (last - first) * line / max(1, n - 1))


def _plain_axes(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(visible=True, alpha=0.25, lw=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan
