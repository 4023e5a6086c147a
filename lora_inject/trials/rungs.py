"""Successive halving (arXiv:1502.07943) in which each rung gives its trials a whole run.

A loss in the middle of a schedule says little about the loss at its end: a large learning rate
looks bad until it falls. So the trials of a rung start again from the beginning, with a schedule
that falls to 0 at the rung's end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

# Chosen on the movie snippets of docs/evidence/search.md (seeds 10 to 17, all losses known). The
# share of random sets of held-out batches by which the best or second best of 16 trials is in the
# last rung (its standard error over seeds is 0.1), and the mean of the found loss minus the best:
#                               a third of the batches      half            all
#   a quarter of the steps, 3 continue:     0.74, 0.011     0.79, 0.010     0.75, 0.016
#   a fifth of the steps, 3 continue:       0.74, 0.018     0.75, 0.019     0.75, 0.024
#   a sixth of the steps, 3 continue:       0.69, 0.023     0.72, 0.023     0.75, 0.024
#   a quarter of the steps, 2 continue:     0.55, 0.018     0.55, 0.018     0.50, 0.021
MORE_STEPS = 5
"""A rung has so many times the steps of the one before it."""
CONTINUE = 5
"""One of so many trials continues, but two at least."""
LEAST_STEPS = 4
"""Steps of the first rung: a shorter run ranks nothing."""
JUDGED = 3
"""Before the last rung, one of so many held-out batches is used."""


def rungs(trials: int, steps: int) -> list[tuple[int, int]]:
    """Return trials and steps of each rung; the last has four trials at most, if steps allow it.

    Examples:
        >>> rungs(16, 64), rungs(5, 64), rungs(4, 64), rungs(64, 128)
        ([(16, 12), (3, 64)], [(5, 12), (2, 64)], [(4, 64)], [(64, 5), (12, 25), (2, 128)])
    """
    sizes = [trials]
    while sizes[-1] > 4 and steps // MORE_STEPS ** len(sizes) >= LEAST_STEPS:
        sizes.append(max(2, sizes[-1] // CONTINUE))
    last = len(sizes) - 1
    return [(size, steps // MORE_STEPS ** (last - i)) for i, size in enumerate(sizes)]


def steps_within(seconds: float, trials: int, per_step: float) -> int:
    """Return the steps of the last rung of a search that takes a given time.

    Args:
        seconds: Time of all steps.
        trials: Number of trials in the first rung.
        per_step: Seconds of one step of all trials.

    Examples:
        >>> steps_within(64.0, 16, 1.0), rungs(16, 165)  # 33 + 165 * 3 / 16 = 64 seconds
        (165, [(16, 33), (3, 165)])
    """
    plan = rungs(trials, many := MORE_STEPS**16)
    most = seconds / per_step / sum(size * steps / trials / many for size, steps in plan)
    first: int = MORE_STEPS ** (len(plan) - 1)
    return max(1, int(most // first)) * first


def ranked(losses: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the trials whose mean loss is finite, the best first."""
    means = {name: fmean(values) for name, values in losses.items()}
    return sorted((n for n, v in means.items() if math.isfinite(v)), key=means.__getitem__)


def behind(losses: Sequence[float], best: Sequence[float]) -> str:
    """Say how much higher losses are than the best on the same batches, with the standard error.

    Examples:
        >>> behind([2.0, 3.5], [1.0, 2.0]), behind([2.0], [1.5])
        ('+1.2500 \u00b1 0.2500', '+0.5000')
    """
    apart = [a - b for a, b in zip(losses, best, strict=True)]
    error = f" \u00b1 {stdev(apart) / math.sqrt(len(apart)):.4f}" if len(apart) > 1 else ""
    return f"{fmean(apart):+.4f}{error}"
