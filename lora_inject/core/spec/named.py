"""Names that a caller's patterns mean, directly or by a module around them."""

from __future__ import annotations

from collections.abc import Iterable

from lora_inject.core.spec.below import Below, around
from lora_inject.core.spec.patterns import matching
from lora_inject.core.spec.spellings import nearest
from lora_inject.errors import LoraInjectError, StateError, check_type


def named(
    names: Iterable[str],
    patterns: Iterable[str],
    asked: str,
    error: type[LoraInjectError] = StateError,
) -> dict[str, None]:
    """Return the names that patterns match, directly or by a parent; each pattern must match."""
    names = list(names)
    chosen: dict[str, None] = {}
    modules = [*names, *around(names)]
    for pattern in patterns:
        check_type(f"{asked}, a pattern", pattern, str, "Give a regex for the end of a name", error)
        below = Below(matching(pattern, modules, asked=f"{asked} {pattern!r}", error=error))
        matched = dict.fromkeys(name for name in names if name in below)
        if not matched:
            close = ", ".join(map(repr, nearest(pattern, modules))) or "none"
            raise error(f"{asked} {pattern!r}", "it matches nothing", f"Nearest: {close}")
        chosen |= matched
    return {name: None for name in names if name in chosen}
