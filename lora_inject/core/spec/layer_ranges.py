"""The `layers` of a rule: ranges of the first number in a name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
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


def inside(
    layers: Sequence[str], names: Sequence[str], label: str, every: Iterable[str]
) -> list[str]:
    """Return the names in these layers; raise if there are none, or for layers of no name at all.

    `every` has all names of the model: what one rule matches need not be in each of its layers.
    """
    kept = _in(layers, names)
    missing = [text for text in layers if not kept or not _in([text], every)]
    if not missing:
        return kept
    problem = f"nothing that it matches is in layers {', '.join(missing)}"
    numbers = [n for name in names if (n := first_number(name)) is not None]
    if not numbers:
        raise MatchError(label, problem, "Remove layers; no name that it matches has one")
    raise MatchError(label, problem, f"Its layers are {min(numbers)} to {max(numbers)}")


def _in(layers: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return the names whose first number is in one of the ranges."""
    ends = [[int(end) for end in text.split("-")] for text in layers]
    spans = [range(end[0], end[-1] + 1) for end in ends]
    return [name for name in names if any(first_number(name) in span for span in spans)]
