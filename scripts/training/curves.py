"""A picture of a run: the loss of training, and the metric of the held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw"]


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, path: Path) -> Path | None:
    """Draw the curves of one or more runs.

    Args:
        runs: Name to Trainer's record of the run.
        metric: What to draw beside the loss, as the record names it.
        path: The PNG to write.

    Returns:
        The path, or None where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, title in ((left, "loss", "loss of training"), (right, metric, "held-out rows")):
        for name, record in runs.items():
            points = [(entry["step"], entry[key]) for entry in record if key in entry]
            axes.plot(*zip(*points, strict=True), marker="." if axes is right else "", label=name)
        axes.set(xlabel="step", ylabel=key.removeprefix("eval_"), title=title)
        axes.grid(alpha=0.3)
        if len(runs) > 1:
            axes.legend()
    figure.savefig(path, dpi=120)
    return path
