"""Names that lie below modules."""

from __future__ import annotations

from collections.abc import Iterable

from lora_inject.core.spec.inventory import Inventory
from lora_inject.core.spec.names import parent
from lora_inject.core.spec.patterns import matching
from lora_inject.core.spec.spellings import nearest
from lora_inject.errors import LoraInjectError, StateError, check_type


def around(names: Iterable[str]) -> list[str]:
    """Return the modules around names, the innermost first, each once."""
    around_them: dict[str, None] = {}
    for name in names:
        module = parent(name)
        while module and module not in around_them:
            around_them[module] = None
            module = parent(module)
    return list(around_them)


class Below:
    """Whether a name, or a module around it, is in a set; each module is looked up once."""

    def __init__(self, names: Iterable[str]) -> None:
        self._known = dict.fromkeys(names, True)
        self._known.setdefault("", False)

    def __contains__(self, name: str) -> bool:
        asked = []
        while (known := self._known.get(name)) is None:  # "" is always known
            asked.append(name)
            name = parent(name)
        self._known.update(dict.fromkeys(asked, known))
        return known


def modules_of(inventory: Inventory) -> list[str]:
    """Return the names of all modules of a model, containers included."""
    tensors = (inventory.listed, inventory.weights)
    own = (name for name in inventory.names if not any(name in table for table in tensors))
    return list(dict.fromkeys([*own, *around([*inventory.names, *inventory.listed])]))


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
