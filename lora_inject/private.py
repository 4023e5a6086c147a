"""The way to what other libraries keep private, and not every version has.

`look_up` finds such a name, or None, and what stands on it goes another way. Names that every
version of a library has are used as they are. `tests/test_private_names.py` looks for each in the
library at hand.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any


@cache
def look_up(name: str) -> Any:
    """Return what a private name stands for, None where the library at hand does not have it.

    Args:
        name: In full, with its module.

    Examples:
        >>> look_up("torch._C._are_functorch_transforms_active")()
        False
    """
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            value: Any = import_module(".".join(parts[:n]))
        except ImportError:
            continue
        for part in parts[n:]:
            value = getattr(value, part, None)
        return value
    return None
