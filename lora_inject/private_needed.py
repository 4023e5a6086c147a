"""Refuse a feature that stands on a private name which the library at hand lacks; see `private`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lora_inject.errors import LayerError
from lora_inject.private import look_up


def needed(name: str, asked: str) -> Any:
    """Return what a private name stands for, or refuse what stands on it.

    Args:
        name: In full, as in `NAMES`.
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
