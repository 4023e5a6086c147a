"""Names that lie below modules."""

from __future__ import annotations

from collections.abc import Iterable

from lora_inject.core.spec.inventory import Inventory
from lora_inject.core.spec.names import parent


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
