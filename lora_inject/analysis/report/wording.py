"""Numbers and names as the report writes them.

Three digits are enough to read, and what is no number is shown as such.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median


def span(values: Sequence[int]) -> str:
    """Return the range of sorted numbers: `8`, or `4 to 16`."""
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def number(value: float) -> str:
    """Return a number with three digits, `-` for none.

    Example:
        >>> number(0.012345), number(float("nan")), number(float("inf"))
        ('0.0123', '-', 'inf')
    """
    if not math.isfinite(value):
        return "-" if math.isnan(value) else "inf"
    return f"{value:.3g}"


def percent(value: float) -> str:
    """Return a share in per cent."""
    return f"{value * 100:.3g} %" if math.isfinite(value) else number(value)


def mean(values: Iterable[float]) -> float:
    """Return the mean of the finite ones, NaN where there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def median_of(values: Iterable[float]) -> float:
    """Return the median of the finite ones, NaN where there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return median(finite) if finite else math.nan
