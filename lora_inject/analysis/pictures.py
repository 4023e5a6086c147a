"""The pictures of an analysis, as PNG: the spectra of a kind of site, a line for each layer."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator, Sequence
from typing import Any

from lora_inject.analysis.figures import Analysis, BlockFigures
from lora_inject.errors import StateError

SIZE = (5.0, 2.6)  # inches
SHOWN = (0.4, 0.85)  # of the color scale: its ends are lost on white
NAMED = 5  # lines that a legend names, evenly spaced
STYLE: Any = {"font.size": 9, "legend.frameon": False, "axes.linewidth": 0.5}


def need_matplotlib() -> None:
    """Raise an error before a long computation if matplotlib is missing.

    Raises:
        StateError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        remedy = "Run pip install matplotlib"
        raise StateError("draw a picture", "matplotlib is not installed", remedy)


def spectra(analysis: Analysis) -> Iterator[tuple[str, bytes]]:
    """Yield for each kind of block its name and a picture of its singular values."""
    kinds: dict[str, list[BlockFigures]] = {}
    for block in analysis.blocks:
        kinds.setdefault(block.kind, []).append(block)
    for kind, blocks in kinds.items():
        # A file may hold layer 10 before layer 2.
        yield kind, _drawn(sorted(blocks, key=lambda block: block.position))


def _drawn(blocks: Sequence[BlockFigures]) -> bytes:
    """Draw singular values over the largest of each block, the deeper the lighter."""
    need_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure  # of no window and no global state
    from matplotlib.ticker import MaxNLocator

    lines = [(b.at, b.spectrum.values[: b.spectrum.rank]) for b in blocks if b.spectrum.rank]
    last = max(len(lines) - 1, 1)
    named = {i * (len(lines) - 1) // (NAMED - 1) for i in range(NAMED)}
    written = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        for number, (layer, values) in enumerate(lines):
            color = mpl.colormaps["viridis"](SHOWN[0] + (SHOWN[1] - SHOWN[0]) * number / last)
            label = layer if number in named else None
            directions = range(1, len(values) + 1)
            how: Any = {"ms": 3, "lw": 1, "color": color, "label": label}
            axes.semilogy(directions, values / values[0], ".-", **how)
        axes.set_xlabel("direction")
        axes.set_ylabel("singular value / largest")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(visible=True, alpha=0.25)
        if lines:
            figure.legend(title="layer", loc="outside right upper")
        figure.savefig(written, format="png", dpi=120)
    return written.getvalue()
