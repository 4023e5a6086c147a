"""Small drawings as SVG text: strips of heat, curves, bars.

A drawing is a function from numbers to text, without size or colour of its own. It fills
the width it is given, and classes take their colours from the page's style, light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

LEVELS = 16
"""Steps of the scale of colour: classes `h0` to `h15`, and `hx` for no value."""
WIDTH, HEIGHT = 320, 170
LEFT, RIGHT, TOP, BOTTOM = 40, 6, 8, 24


def level(value: float, low: float, high: float) -> str:
    """Return the class of a value on a scale from `low` to `high`.

    Example:
        >>> level(0.0, 0.0, 1.0), level(1.0, 0.0, 1.0), level(float("nan"), 0.0, 1.0)
        ('h0', 'h15', 'hx')
    """
    if not math.isfinite(value):
        return "hx"
    share = (value - low) / (high - low) if high > low else 1.0
    return f"h{min(LEVELS - 1, max(0, int(share * LEVELS)))}"


def strip(cells: Sequence[tuple[float, str]], low: float, high: float, about: str) -> str:
    """Draw one row of cells that fills its width.

    Args:
        cells: Value and tooltip of each; NaN is left blank.
        low: Value of the faintest colour.
        high: Value of the strongest.
        about: What it shows, for those who cannot see it.
    """
    drawn = "".join(
        f'<rect class="{level(value, low, high)}" x="{i}" width="1" height="1">'
        f"<title>{escape(tip)}</title></rect>"
        for i, (value, tip) in enumerate(cells)
    )
    return (
        f'<svg class="strip" viewBox="0 0 {max(1, len(cells))} 1" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(about)}">{drawn}</svg>'
    )


def curves(series: Sequence[tuple[Sequence[float], str]], about: str) -> str:
    """Draw falling curves on a logarithmic scale, the first fainter than the last.

    Args:
        series: Values above 0 (others end the curve) and the tooltip of each curve.
        about: What it shows, for those who cannot see it.
    """
    points = [([v for v in values if v > 0], tip) for values, tip in series]
    longest = max((len(values) for values, _ in points), default=1)
    smallest = min((v for values, _ in points for v in values), default=0.1)
    decades = min(8, max(1, math.ceil(-math.log10(smallest))))
    lines = []
    for number, (values, tip) in enumerate(points):
        spots = [(_across(i, longest), _down(-math.log10(v) / decades))
                 for i, v in enumerate(values)]  # fmt: skip
        shade = level(number + 4, 0, len(points) + 4)  # the faintest would be lost on the ground
        path = " ".join(f"{x:.1f},{min(y, HEIGHT - BOTTOM):.1f}" for x, y in spots)
        lines.append(
            f'<polyline class="s{shade}" points="{path}"><title>{escape(tip)}</title></polyline>'
        )
    step = math.ceil(decades / 4)
    rules = [(_down(d / decades), f"1e-{d}" if d else "1") for d in range(0, decades + 1, step)]
    return _frame("".join(lines), rules, _ticks(longest), about)


def bars(values: Sequence[tuple[float, str, str]], about: str) -> str:
    """Draw a bar for each value, from 0 up.

    Args:
        values: Value, label below and tooltip of each; NaN is left out.
        about: What it shows, for those who cannot see it.
    """
    finite = [value for value, _, _ in values if math.isfinite(value)]
    high = max(finite, default=0.0) or 1.0
    width = (WIDTH - LEFT - RIGHT) / max(1, len(values))
    drawn = []
    for i, (value, _, tip) in enumerate(values):
        if math.isfinite(value):
            y = _down(1 - value / high)
            drawn.append(
                f'<rect class="bar" x="{LEFT + i * width + 0.1 * width:.2f}" y="{y:.2f}" '
                f'width="{0.8 * width:.2f}" height="{HEIGHT - BOTTOM - y:.2f}">'
                f"<title>{escape(tip)}</title></rect>"
            )
    rules = [(_down(1 - share), f"{share * high:.2g}") for share in (0.0, 0.5, 1.0)]
    every = max(1, -(-len(values) // 8))
    ticks = [
        (LEFT + (i + 0.5) * width, label)
        for i, (_, label, _) in enumerate(values)
        if i % every == 0
    ]
    return _frame("".join(drawn), rules, ticks, about)


def _frame(
    inside: str, rules: Iterable[tuple[float, str]], ticks: Iterable[tuple[float, str]], about: str
) -> str:
    lines = "".join(
        f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{escape(text)}</text>'
        for y, text in rules
    )
    below = "".join(
        f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{escape(text)}</text>'
        for x, text in ticks
    )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(about)}">{lines}{inside}{below}</svg>'
    )


def _across(i: int, n: int) -> float:
    return LEFT + 4 + (WIDTH - LEFT - RIGHT - 8) * (i / max(1, n - 1))


def _down(share: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * share


def _ticks(n: int) -> list[tuple[float, str]]:
    every = max(1, -(-n // 8))
    return [(_across(i, n), str(i + 1)) for i in range(0, n, every)]
