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


def _numbered(name: str) -> tuple[str, int] | None:
    """Return the list that a name is in and its number there, by the first number in the name."""
    parts = name.split(".")
    numbers = ((".".join(parts[:i]), int(part)) for i, part in enumerate(parts) if part.isdecimal())
    return next(numbers, None)


def first_number(name: str) -> int | None:
    """Return the first number among the segments of a name: its layer.

    Examples:
        >>> first_number("model.layers.3.experts.0.up"), first_number("lm_head")
        (3, None)
    """
    return numbered[1] if (numbered := _numbered(name)) else None


def inside(
    layers: Sequence[str], names: Sequence[str], label: str, every: Iterable[str]
) -> list[str]:
    """Return the names in these layers; raise if there are none, or for layers that do not exist.

    `every` has all names of the model: what one rule matches need not be in each of its layers.
    """
    ends = {text: [int(end) for end in text.split("-")] for text in layers}
    spans = {text: range(end[0], end[-1] + 1) for text, end in ends.items()}
    kept = [name for name in names if any(first_number(name) in span for span in spans.values())]
    lists = {numbered[0] for name in names if (numbered := _numbered(name))}
    there = {n[1] for name in every if (n := _numbered(name)) and n[0] in lists}
    missing = [text for text, span in spans.items() if not (kept and all(n in there for n in span))]
    if not missing:
        return kept
    problem = f"it does not find all of layers {', '.join(missing)}"
    if not there:
        raise MatchError(label, problem, "Remove layers; no name that it matches has one")
    raise MatchError(label, problem, f"Its layers are {min(there)} to {max(there)}")
