"""The error of a name that no adapter of a model has."""

from __future__ import annotations

from collections.abc import Collection

from lora_inject.core.spec.spellings import nearest
from lora_inject.errors import StateError


def no_such_adapter(known: Collection[str], name: str, verb: str) -> StateError:
    """Return the error, with the nearest name."""
    there = ", ".join(map(repr, sorted(known))) or "none"
    close = nearest(name, known, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else "Inject or load it first"
    return StateError(f"{verb} {name!r}", f"the model's adapters are: {there}", hint)
