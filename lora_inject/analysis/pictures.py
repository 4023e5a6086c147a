"""Pictures like the paper's figures 3, 4 and 6 to 8, as PNG.

Each of these figures is a table of heat maps of phi on one color scale, i downwards
and j to the right, the first in the corner above on the left. Two ranks have a second column that
zooms into the corner where j <= i, as the paper does; two seeds have the random baseline next to
them. Drawn by matplotlib, which is imported here and nowhere else.
Source: arXiv:2106.09685, figures 3, 4, 6, 7, 8.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_inject.errors import StateError

COLORS = "viridis"
INCHES = 2.6  # side of a panel
MAX_TICKS = 8


@dataclass(frozen=True)
class Panel:
    """One heat map.

    Attributes:
        grid: `(rows, columns)` of phi; NaN is left blank.
        title: Above it.
        rows: Label of i.
        columns: Label of j.
    """

    grid: Tensor
    title: str = ""
    rows: str = "i"
    columns: str = "j"


def zoomed(grid: Tensor) -> Tensor:
    """Take the corner of a grid where j <= i, with the rest blank: the zoom of figures 3 and 6.

    Args:
        grid: `(r1, r2)` of phi.

    Returns:
        `(n, n)` with n the smaller side; NaN where j > i.

    Examples:
        >>> zoomed(torch.tensor([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]]))
        tensor([[0.9000,    nan],
                [0.6000, 0.5000]])
    """
    n = min(grid.shape)
    upper = torch.ones(n, n, dtype=torch.bool).triu(1)
    return grid[:n, :n].detach().cpu().clone().masked_fill(upper, float("nan"))


def figure_ranks(
    grids: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    ranks: tuple[str, str] = ("i", "j"),
    *,
    title: str = "",
) -> Path:
    """Draw phi between adapters of two ranks: figure 3, and with several layers figure 6.

    Args:
        grids: Title, such as `q, layer 48`, to `(r1, r2)` of phi.
        path: The PNG to write.
        ranks: Labels of the rows and of the columns, such as `("i (r=8)", "j (r=64)")`.
        title: Above all.

    Returns:
        The path.

    Raises:
        StateError: matplotlib is not installed, or there is nothing to draw.
    """
    rows = [
        [Panel(grid, name, *ranks), Panel(zoomed(grid), f"{name}, zoomed", *ranks)]
        for name, grid in grids.items()
    ]
    return draw_panels(rows, path, title)


def figure_seeds(
    grids: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    baseline: Tensor | None = None,
    *,
    columns: int = 3,
    title: str = "",
) -> Path:
    """Draw phi between two seeds of one rank: figure 4, and with several layers figure 7.

    Args:
        grids: Title to `(r, r)` of phi.
        path: The PNG to write.
        baseline: Phi of two random Gaussian matrices, drawn as the last panel.
        columns: Panels in a row.
        title: Above all.

    Returns:
        The path.

    Raises:
        StateError: matplotlib is not installed, or there is nothing to draw.
    """
    panels = [Panel(grid, name) for name, grid in grids.items()]
    if baseline is not None:
        panels.append(Panel(baseline, "random Gaussian"))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    return draw_panels(rows, path, title)


def figure_weight(
    grids: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    baseline: Tensor | None = None,
    *,
    title: str = "",
) -> Path:
    """Draw phi between directions of W and of deltas of several ranks: figure 8.

    Args:
        grids: Title, such as `r = 4`, to `(n, r)` of phi: n directions of W, r of the delta.
        path: The PNG to write.
        baseline: The same with a random matrix in place of the delta.
        title: Above all.

    Returns:
        The path.

    Raises:
        StateError: matplotlib is not installed, or there is nothing to draw.
    """
    panels = [Panel(grid, name, "i (W)", "j (delta)") for name, grid in grids.items()]
    if baseline is not None:
        panels.append(Panel(baseline, "random", "i (W)", "j (random)"))
    return draw_panels([panels], path, title)


def figure_spectra(spectra: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Draw singular values, each set over its largest, on a logarithmic scale.

    Args:
        spectra: Name to `(n,)` singular values, decreasing.
        path: The PNG to write.

    Returns:
        The path.

    Raises:
        StateError: matplotlib is not installed, or there is nothing to draw.
    """
    drawn = {name: values for name, values in spectra.items() if len(values) and values[0] > 0}
    _check_drawable(bool(drawn))
    figure = new_figure(1.6 * INCHES, 2.4 * INCHES, "constrained")
    axes = figure.subplots()
    for name, values in drawn.items():
        relative = (values / values[0]).tolist()
        axes.semilogy(range(1, len(relative) + 1), relative, marker=".", label=_plain(name))
    axes.set_xlabel("direction")
    axes.set_ylabel("singular value over the largest")
    if len(drawn) > 1:
        axes.legend(fontsize=7)
    return _save(figure, path)


def draw_panels(
    panels: Sequence[Sequence[Panel]], path: str | os.PathLike[str], title: str = ""
) -> Path:
    """Draw rows of heat maps on one color scale from 0 to 1.

    Args:
        panels: Row by row.
        path: The PNG to write.
        title: Above all.

    Returns:
        The path.

    Raises:
        StateError: matplotlib is not installed, or there is nothing to draw.
    """
    return _save(grid_of_panels(panels, title), path)


def grid_of_panels(
    panels: Sequence[Sequence[Panel]], title: str = "", inches: float = INCHES
) -> Any:
    """Return rows of heat maps as a figure of matplotlib.

    Args:
        panels: Row by row.
        title: Above all.
        inches: Side of a panel.

    Raises:
        StateError: matplotlib is not installed, or there is nothing to draw.
    """
    wide = max((len(row) for row in panels), default=0)
    _check_drawable(any(panel.grid.numel() for row in panels for panel in row))
    figure = new_figure(inches * len(panels), inches * wide + 0.8, "constrained")
    table = figure.subplots(len(panels), wide, squeeze=False)
    image = None
    for axes_row, row in zip(table, panels, strict=True):
        for axes in axes_row[len(row) :]:
            axes.set_axis_off()
        for axes, panel in zip(axes_row, row, strict=False):
            image = _draw(axes, panel) or image
    bar = figure.colorbar(image, ax=table, label="\u03c6(i, j)", fraction=0.03, aspect=30)
    bar.solids.set_rasterized(True)
    if title:
        figure.suptitle(_plain(title), fontsize=9)
    return figure


def _draw(axes: Any, panel: Panel) -> Any:
    axes.set_title(_plain(panel.title), fontsize=8)
    if not panel.grid.numel():
        axes.set_axis_off()
        return None
    rows, columns = panel.grid.shape
    image = axes.imshow(
        panel.grid.detach().cpu().tolist(),
        vmin=0,
        vmax=1,
        cmap=COLORS,
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, columns + 0.5, rows + 0.5, 0.5),
    )
    axes.set_xticks(_ticks(columns))
    axes.set_yticks(_ticks(rows))
    axes.tick_params(labelsize=6)
    axes.set_xlabel(panel.columns, fontsize=7)
    axes.set_ylabel(panel.rows, fontsize=7)
    return image


def _ticks(n: int) -> list[int]:
    step = -(-n // MAX_TICKS)
    return list(range(1, n + 1, step))


def _plain(text: str) -> str:
    """Keep matplotlib from reading a name as mathematics."""
    return text.replace("$", r"\$")


def need_matplotlib() -> None:
    """Refuse now rather than after minutes of computing.

    Raises:
        StateError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise StateError(
            "draw a picture",
            "matplotlib is not installed",
            "Install it: pip install 'lora-inject[analysis]', or pip install matplotlib",
        )


def _check_drawable(drawable: bool) -> None:
    if not drawable:
        raise StateError(
            "draw a picture",
            "there is nothing to draw: no directions, no values",
            "An adapter whose B is zero has none; train it first",
        )


def new_figure(height: float, width: float, layout: Any = None) -> Any:
    """Return an empty figure of matplotlib that belongs to no window and no global state.

    Args:
        height: In inches.
        width: In inches.
        layout: Matplotlib's layout engine; None where axes are placed by hand.

    Raises:
        StateError: matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(place, format="png", dpi=150)
    return place
