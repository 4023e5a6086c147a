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
    """Return the names whose first number is in a range; raise if one of the ranges has none."""
    spans = {text: _span(text) for text in layers}
    numbers = {name: n for name in names if (n := first_number(name)) is not None}
    there = numbers.values()
    if empty := [text for text, span in spans.items() if not any(n in span for n in there)]:
        problem = f"nothing that it matches is in layers {', '.join(empty)}"
        if not numbers:
            remedy = "Remove layers; no name that it matches has one"
            raise MatchError(label, problem, remedy)
        raise MatchError(label, problem, f"Its layers are {min(there)} to {max(there)}")
    return [name for name, n in numbers.items() if any(n in span for span in spans.values())]


def _span(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)
