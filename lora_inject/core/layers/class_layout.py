"""Swapped classes of layers whose objects do not begin as nn.Module's in memory."""

from __future__ import annotations

import types
from typing import Any


def in_layout_of(plain: type, wanted: type, namespace: dict[str, Any]) -> Any:
    """Return a class like `wanted` that instances of `plain` can change to.

    Python lets an object change its class only where both derive first from the same layout. Where
    a mixin stands before nn.Module ours has to come second among the
    bases, and first in the order in which methods are looked up.
    """
    meta: Any = type("Reordered", (type(plain),), {"mro": lambda cls: [cls, *wanted.__mro__[1:]]})
    bases = wanted.__bases__[::-1]
    return types.new_class(
        plain.__name__, bases, {"metaclass": meta}, lambda ns: ns.update(namespace)
    )
