"""The error of a module that holds itself: its names would have no end."""

from __future__ import annotations

from lora_inject.errors import LayerError


def endless(name: str, depth: int) -> LayerError:
    """Return the error of a module that lies deeper than any model."""
    return LayerError(
        f"walk the model, module '{name[:80]}...'",
        f"it lies {depth} modules deep: a module holds one that holds it (its parent?)",
        "Keep such a reference in a tuple, or set it with object.__setattr__; train() and eval() "
        "of torch would not end either",
    )
