"""The pictures of an analysis: figures of matplotlib, as SVG inside the page and as PNG files.

In the page, text stays text in the color of the page. Each value that a
picture shows by color is also in one of the tables.
"""

from __future__ import annotations

import importlib.util
import io
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from torch import Tensor

from lora_inject.analysis.figures import Analysis
from lora_inject.analysis.numbers import Place, by_kind
from lora_inject.core.spec.names import printable
from lora_inject.errors import StateError, user_path

COLORS = "viridis"
LINES = (0.4, 0.85)  # of the color scale for lines: its ends are lost on black and on white
WIDTH = 5.0  # inches: 360 units of SVG, so that text keeps its size on a narrow screen
ROW, FOOT = 0.25, 0.85  # inches: one row of a heat map, its axis and legend
MOST_TICKS = 10
FEW = 5  # lines that a legend names where there are many
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


# ---------------------------------------------------------------------------------- which ones


def pictures(analysis: Analysis) -> dict[str, list[tuple[str, Any]]]:
    """Return titles and figures by the section of the page that shows them."""
    blocks, beside, kinds = analysis.blocks, analysis.on_weight(), by_kind(analysis.blocks)
    likeness = {
        form: [(Place(name, ""), site.rounded[form].likeness if site.changed else math.nan)
               for name, site in analysis.weights.items()]
        for form in ("bfloat16", "float16")
    }  # fmt: skip
    return {
        "maps": [
            *_map("Size of the delta, |D| / |W|", beside, "relative"),
            *_map("Size of the delta, |D|", () if beside else blocks, "spectrum.norm"),
            *_map("Rank that holds 99%, over the configured rank", blocks, "needed_share", 1.0),
            *_map("Effective rank", blocks, "spectrum.effective_rank"),
            *_map("Energy in the first direction", blocks, "spectrum.first_share", 1.0),
        ],
        "spectra": [
            (kind, spectra_figure([(b.at, b.spectrum.values) for b in same]))
            for kind, same in kinds.items()
        ],
        "rounding": [
            (f"Likeness in {form}", heat_map(of_sites, 1.0))
            for form, of_sites in likeness.items() if of_sites
        ],
    }  # fmt: skip


def _map(
    title: str, places: Sequence[Place], value: str, high: float | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield a heat map of an attribute of blocks, if there are any."""
    if places:
        yield title, heat_map([(place, attrgetter(value)(place)) for place in places], high)


def draw_pictures(folder: str | os.PathLike[str], analysis: Analysis) -> list[Path]:
    """Write the pictures of an analysis as PNG files.

    Args:
        folder: Where to; made as needed, files of the same names are replaced.
        analysis: The figures.

    Returns:
        The files.

    Raises:
        StateError: matplotlib is not installed.
    """
    place = user_path("draw pictures, folder", folder)
    return [
        png(figure, place / f"{section}-{_slug(title)}.png", title)
        for section, drawn in pictures(analysis).items()
        for title, figure in drawn
    ]


# -------------------------------------------------------------------------------------- figures


@_styled()
def png(figure: Any, path: str | os.PathLike[str], title: str = "") -> Path:
    """Write a figure into a file, folders made as needed."""
    place = user_path("draw", path)
    place.parent.mkdir(parents=True, exist_ok=True)
    if title:
        figure.suptitle(printable(title), fontsize=9)
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


@_styled()
def heat_map(cells: Iterable[tuple[Place, float]], high: float | None = None) -> Any:
    """Return a row for each kind and a column for each layer, on a scale from 0.

    The experts of a layer share a square, with their mean; a square without a finite value is
    blank.
    """
    groups: dict[str, dict[tuple[int, ...], list[float]]] = {}
    for place, value in cells:
        groups.setdefault(place.kind, {}).setdefault(place.position, []).append(value)
    positions = sorted({at for row in groups.values() for at in row})
    grid = [[_mean(row.get(at, ())) for at in positions] for row in groups.values()]
    figure, axes = _one_plot(ROW * len(grid) + FOOT)
    image = axes.imshow(grid, vmin=0.0, vmax=high, cmap=COLORS, aspect="auto", interpolation="none")
    prefix = shared_prefix(groups)
    axes.set_yticks(range(len(groups)), [printable(kind.removeprefix(prefix)) for kind in groups])
    shown = range(0, len(positions), -(-len(positions) // MOST_TICKS))
    axes.set_xticks(shown, [".".join(map(str, positions[i])) or "-" for i in shown])
    axes.set_xlabel("layer", labelpad=1)
    axes.tick_params(length=2)
    bar = figure.colorbar(image, ax=axes, location="bottom", fraction=0.1, aspect=40, pad=0.02)
    bar.solids.set_rasterized(True)
    bar.outline.set_visible(False)
    bar.ax.locator_params(nbins=5)
    bar.ax.tick_params(length=2)
    return figure


@_styled()
def spectra_figure(lines: Sequence[tuple[str, Tensor]]) -> Any:
    """Return singular values over the largest of each, a line for each label.

    The legend names some of them, evenly spaced.
    """
    from matplotlib.ticker import LogLocator

    positive = ((label, values[values > 0].tolist()) for label, values in lines)
    drawn = [(label, values) for label, values in positive if values]
    below = any(len(label) > FEW for label, _ in drawn)
    figure, axes = _one_plot(2.2 + 0.3 * len(drawn) * below)
    in_legend = set(evenly_spaced(range(len(drawn))))
    for number, (label, values) in enumerate(drawn):
        relative = [value / values[0] for value in values]
        text = printable(label) if number in in_legend else None
        axes.semilogy(range(1, len(values) + 1), relative, marker=".", ms=3, lw=0.9,
                      color=_shade(number, len(drawn)), label=text)  # fmt: skip
    axes.set_xlabel("direction")
    axes.set_ylabel("singular value / largest")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(visible=True, alpha=0.25, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if drawn:  # 1 and 3 of each decade, without powers
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter("")
        where = "outside lower left" if below else "outside right upper"
        figure.legend(title="layer", fontsize=SMALL, title_fontsize=SMALL, loc=where)
    return figure


# ---------------------------------------------------------------------------------------- parts


def evenly_spaced(items: Sequence[T]) -> list[T]:
    """Take up to `FEW` items, evenly spaced from the first to the last.

    Examples:
        >>> evenly_spaced(range(97)), evenly_spaced("ab")
        ([0, 24, 48, 72, 96], ['a', 'b'])
    """
    n = min(FEW, len(items))
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


def _slug(title: str) -> str:
    """Return a title as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", title.replace("*", "")).strip("-") or "site"


def _one_plot(height: float) -> tuple[Any, Any]:
    """Return a figure as wide as the page, of no window and no global state, and its only axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _shade(line: int, n: int) -> Any:
    import matplotlib as mpl

    first, last = LINES
    return mpl.colormaps[COLORS](first + (last - first) * line / max(1, n - 1))


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan
