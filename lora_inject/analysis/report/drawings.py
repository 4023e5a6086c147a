"""The drawings of the report as SVG that stands inside the page.

Matplotlib draws, with one color scale for everything. Text stays text, in the color of the page
around it, so that a drawing can be read in light and dark. Whatever a drawing shows by color is
also a number in one of the report's tables.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import Tensor

from lora_inject.analysis.pictures import COLORS, Panel, grid_of_panels, new_figure
from lora_inject.analysis.places import Place
from lora_inject.spec.names import printable

WIDTH = 5.0  # inches: 360 units of SVG, so that text keeps its size on a narrow screen
LEFT, RIGHT, TOP = 0.1, 0.18, 0.04  # inches around a heat map
ROW, FOOT = 0.25, 0.8  # inches: one row of a heat map, its axis and legend
CHAR = 0.088  # inches: a character of a label, at least
LINES = (0.25, 0.85)  # of the color scale for lines: its ends are lost on black and on white
INK = "#010203"  # stands for the page's own color of text
# Fonts that a browser may find; text is measured with the one that matplotlib brings.
FONT = "DejaVu Sans, Verdana, sans-serif"


@dataclass(frozen=True)
class Cell:
    """One figure of one block."""

    place: Place
    value: float


@contextmanager
def _style() -> Iterator[None]:
    """Set matplotlib's style for the time of one drawing."""
    import matplotlib as mpl

    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    chosen: Any = {
        **dict.fromkeys(inked, INK),
        "font.size": 9.5,
        "legend.frameon": False,
        "axes.linewidth": 0.5,
        "svg.fonttype": "none",
        "svg.hashsalt": "lora_inject",  # equal figures give equal files
        "text.parse_math": False,  # a name may hold dollars
    }
    with mpl.rc_context(chosen), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has other fonts
        yield


def _svg(figure: Any, about: str) -> str:
    """Return a figure as an `<svg>` element."""
    from markupsafe import escape

    written = io.StringIO()
    without = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(written, format="svg", transparent=True, metadata=without)
    text = written.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # the same in every drawing of the page
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", rf"font: \1px {FONT}", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(about)}"', 1)


def heat_map(
    title: str, cells: Sequence[Cell], low: float | None = None, high: float | None = None
) -> str:
    """Draw a row for each kind of site and a column for each layer.

    Args:
        title: What is drawn.
        cells: A figure for each block; experts of one layer share a square, with their mean.
        low: Value of the darkest color; the smallest value where it is not given.
        high: Value of the lightest color; the largest value where it is not given.
    """
    groups: dict[str, dict[tuple[int, ...], list[float]]] = {}
    for cell in cells:
        row = groups.setdefault(cell.place.kind, {})
        row.setdefault(cell.place.position, []).append(cell.value)
    positions = sorted({at for row in groups.values() for at in row})
    grid = [[_mean(row.get(at, ())) for at in positions] for row in groups.values()]
    prefix = shared_prefix(list(groups))
    labels = [printable(kind.removeprefix(prefix)) for kind in groups]
    with _style():
        height = ROW * len(grid) + FOOT + TOP
        figure = new_figure(height, WIDTH)
        left = min(0.6 * WIDTH, LEFT + CHAR * max(map(len, labels)))
        across = WIDTH - left - RIGHT
        axes = figure.add_axes(_box(left, FOOT, across, ROW * len(grid), height))
        image = axes.imshow(grid, vmin=low, vmax=high, cmap=COLORS, aspect="auto",
                            interpolation="none")  # fmt: skip
        axes.set_yticks(range(len(labels)), labels)
        every = -(-len(positions) // 10)
        shown = range(0, len(positions), every)
        names = [".".join(map(str, positions[i])) or "-" for i in shown]
        axes.set_xticks(shown, names)
        axes.set_xlabel("layer", labelpad=1)
        axes.tick_params(length=2)
        legend = figure.add_axes(_box(left, 0.22, across, 0.1, height))
        _legend(figure, image, legend)
        return _svg(figure, f"{title}, by kind of site and layer")


def _box(left: float, bottom: float, width: float, height: float, whole: float) -> Any:
    """Return a rectangle in inches as shares of the figure."""
    return left / WIDTH, bottom / whole, width / WIDTH, height / whole


def _legend(figure: Any, image: Any, axes: Any) -> None:
    bar = figure.colorbar(image, cax=axes, orientation="horizontal")
    bar.solids.set_rasterized(True)
    bar.outline.set_visible(False)
    bar.ax.locator_params(nbins=5)
    bar.ax.tick_params(length=2)


def shared_prefix(kinds: Sequence[str]) -> str:
    """Return the segments with which all kinds begin: `model.layers.*.`, or nothing.

    Examples:
        >>> shared_prefix(["h.*.attn.q", "h.*.mlp.up"]), shared_prefix(["fc"]), shared_prefix([])
        ('h.*.', '', '')
    """
    parents = [kind.split(" ")[0].split(".")[:-1] for kind in kinds]
    columns = zip(*parents, strict=False)
    shared = takewhile(lambda column: len(set(column)) == 1, columns)
    return "".join(f"{column[0]}." for column in shared)


def spectra(kind: str, blocks: Sequence[tuple[Sequence[float], str]]) -> str:
    """Draw the singular values of one kind, a line for each layer, over the largest of each.

    Args:
        kind: Whose.
        blocks: Values above 0, decreasing, and the layer, in the order of the model.
    """
    from matplotlib.ticker import LogLocator

    drawn = [(values, at) for values, at in blocks if values]
    with _style():
        figure = new_figure(2.2, WIDTH, "constrained")
        axes = figure.subplots()
        for line, (values, at) in enumerate(drawn):
            few = {"label": at} if _named(line, len(drawn)) else {}
            relative = [value / values[0] for value in values]
            axes.semilogy(range(1, len(values) + 1), relative, marker=".", ms=3, lw=0.9,
                          color=_shade(line, len(drawn)), **few)  # fmt: skip
        axes.set_xlabel("direction")
        axes.set_ylabel("singular value / largest")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter("")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _light(axes)
        if drawn:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.legend(title="layer", fontsize=8.5, title_fontsize=8.5, loc="upper left",
                        bbox_to_anchor=(1.0, 1.0))  # fmt: skip
        return _svg(figure, f"singular values of {printable(kind)}")


def _named(line: int, n: int) -> bool:
    """Whether a line is in the legend: up to five, evenly spaced, the ends among them."""
    return n <= 5 or line in {round(i * (n - 1) / 4) for i in range(5)}


def _shade(line: int, n: int) -> Any:
    import matplotlib as mpl

    first, last = LINES
    return mpl.colormaps[COLORS](first + (last - first) * line / max(1, n - 1))


def norms(kinds: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Draw the norm of each delta by depth, a line for each kind.

    Args:
        kinds: Kind to the number of its block, from 0, and its norm.
    """
    prefix = shared_prefix(list(kinds))
    with _style():
        figure = new_figure(2.4 + 0.1 * len(kinds), WIDTH, "constrained")
        axes = figure.subplots()
        for line, (kind, points) in enumerate(kinds.items()):
            label, marker = printable(kind.removeprefix(prefix)), "os^Dv"[line % 5]
            axes.plot(*zip(*points, strict=True), marker=marker, ms=3, lw=0.9, label=label)
        axes.set_xlabel("blocks of a kind, in the order of the model")
        axes.set_ylabel("|D|")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _light(axes)
        figure.legend(fontsize=8.5, loc="outside lower left", ncols=2)
        return _svg(figure, "norm of each delta by depth")


def needed_ranks(ranks: Sequence[int]) -> str:
    """Draw how many blocks need which rank."""
    with _style():
        figure = new_figure(1.9, WIDTH, "constrained")
        axes = figure.subplots()
        counts = [ranks.count(rank) for rank in range(max(ranks) + 1)]
        bars = axes.bar(range(len(counts)), counts, color=_shade(2, 5))
        if len(counts) <= 24:
            axes.bar_label(bars, labels=[str(n) if n else "" for n in counts], fontsize=8.5)
        axes.set_xlabel("rank that holds 99%")
        axes.set_ylabel("blocks")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        _light(axes)
        return _svg(figure, "number of blocks by the rank that holds 99%")


def overlaps(about: str, grids: Mapping[str, Tensor], rows: str, columns: str) -> str:
    """Draw up to four grids of phi, two beside each other.

    Args:
        about: What is drawn.
        grids: Title of each grid, and `(r1, r2)` of phi.
        rows: Label of the rows.
        columns: Label of the columns.
    """
    panels = [Panel(grid, printable(title), rows, columns) for title, grid in grids.items()]
    table = [panels[i : i + 2] for i in range(0, len(panels), 2)]
    with _style():
        inches = 2.3 if len(panels) > 1 else 3.0
        return _svg(grid_of_panels(table, inches=inches), printable(about))


def _light(axes: Any) -> None:
    axes.grid(visible=True, alpha=0.25, lw=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
