"""A place and a value of a config, as messages show them."""

from __future__ import annotations

from typing import Any

from lora_inject.core.spec.names import printable

Loc = tuple[str | int, ...]
"""The keys and indices from a config to a value inside."""


def show(value: Any) -> str:
    """Return the value as the user would recognize it, short and printable."""
    text = f"'{value}'" if isinstance(value, str) else repr(value)
    return printable(text if len(text) <= 60 else f"{text[:57]}...")


def dotted(path: Loc) -> str:
    """Return `("targets", 1, "rank")` as `targets[1].rank`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")
