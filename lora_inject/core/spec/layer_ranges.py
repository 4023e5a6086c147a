"""The `layers` of a rule: ranges of the first number in a name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lora_inject.core.spec.patterns import INDEX
from lora_inject.core.spec.words import show
from lora_inject.errors import MatchError


def layer_range(value: Any) -> str:
    """Return a range as text, `4` or `16-31`; raise ValueError(found, remedy) for other values."""
    text = str(value) if type(value) is int else value
    match = re.fullmatch(rf"({INDEX})(?:-({INDEX}))?", text) if isinstance(text, str) else None
    if match is None or int(match[1]) > int(match[2] or match[1]):
        raise ValueError(f"{show(value)} is not a range of layers", "Write 16-31, or [0, 4, 8-11]")
    return match[0]


def first_number(name: str) -> int | None:
    """Return the first number among the segments of a name: its layer.

    Examples:
        >>> first_number("model.layers.3.experts.0.up"), first_number("lm_head")
        (3, None)
    """
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def inside(layers: Sequence[str], names: Sequence[str], label: str) -> list[str]:
    """Return the names whose first number is in one of the ranges; raise if one of them is empty."""
    numbers = {name: n for name in names if (n := first_number(name)) is not None}
    kept: set[str] = set()
    empty: list[str] = []
    for text in layers:
        first, last = int(text.split("-")[0]), int(text.split("-")[-1])
        there = {name for name, number in numbers.items() if first <= number <= last}
        kept |= there
        empty += [] if there else [text]
    if empty:
        problem = f"nothing that it matches is in layers {', '.join(empty)}"
        remedy = "Remove layers; no name that it matches has one"
        if numbers:
            remedy = f"Its layers are {min(numbers.values())} to {max(numbers.values())}"
        raise MatchError(label, problem, remedy)
    return [name for name in names if name in kept]
