"""The way to what other libraries keep private and may lack: it is None, or refused in words.

A private name may be gone in the next version of its library, or come with one. `look_up` finds
such a name, or None, and what stands on it goes another way or refuses the one feature that needs
it (`needed`). Names that every version of torch from 2.6 on has are used as they are.
`tests/test_private_names.py` looks for each in the library at hand.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from lora_inject.errors import LayerError


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


def needed(name: str, asked: str) -> Any:
    """Return what a private name stands for, or refuse what stands on it.

    Args:
        name: In full, with its module.
        asked: The feature, in the user's words.

    Raises:
        LayerError: The library at hand does not have the name.
    """
    value = look_up(name)
    if value is None:
        library = name.partition(".")[0]
        version = getattr(import_module(library), "__version__", "of an unknown version")
        raise LayerError(
            asked,
            f"it stands on {name}, which {library} {version} does not have",
            f"Use another version of {library}, or of lora-inject",
        )
    return value
