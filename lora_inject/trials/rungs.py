"""Successive halving (arXiv:1502.07943) in which each rung gives its trials a whole run.

A loss in the middle of a schedule says little about the loss at its end: a large learning rate
looks bad until it falls. So the trials of a rung start again from the beginning, with a schedule
that falls to 0 at the rung's end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

KEEP = 4
"""One of so many trials continues, with so many times the steps: all rungs cost the same."""
LEAST_STEPS = 4
"""Steps of the first rung: a shorter run ranks nothing."""


def rungs(trials: int, steps: int) -> list[tuple[int, int]]:
    """Return trials and steps of each rung; the last has four trials at most, if steps allow it.

    Examples:
        >>> rungs(16, 64), rungs(5, 64), rungs(3, 64), rungs(64, 32)
        ([(16, 16), (4, 64)], [(5, 16), (2, 64)], [(3, 64)], [(64, 8), (16, 32)])
    """
    sizes = [trials]
    while sizes[-1] > KEEP and steps // KEEP ** len(sizes) >= LEAST_STEPS:
        sizes.append(math.ceil(sizes[-1] / KEEP))
    last = len(sizes) - 1
    return [(size, steps // KEEP ** (last - i)) for i, size in enumerate(sizes)]


def steps_within(seconds: float, trials: int, per_step: float) -> int:
    """Return the steps of the last rung of a search that takes a given time.

    Args:
        seconds: Time of the whole search.
        trials: Number of trials in the first rung.
        per_step: Seconds of one step of all trials.

    Examples:
        >>> steps_within(64.0, 16, 1.0), rungs(16, 128)
        (128, [(16, 32), (4, 128)])
    """
    n = len(rungs(trials, KEEP**16))
    return int(max(1, seconds // (n * per_step)) * KEEP ** (n - 1))


def ranked(losses: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the trials whose mean loss is finite, the best first."""
    means = {name: fmean(values) for name, values in losses.items()}
    return sorted((n for n, v in means.items() if math.isfinite(v)), key=means.__getitem__)


def behind(losses: Sequence[float], best: Sequence[float]) -> tuple[float, float]:
    """Return how much higher losses are than the best on the same batches, and the standard error.

    Examples:
        >>> behind([2.0, 3.0], [1.0, 2.0])
        (1.0, 0.0)
    """
    apart = [a - b for a, b in zip(losses, best, strict=True)]
    error = stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
    return fmean(apart), error
