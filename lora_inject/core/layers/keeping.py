"""Code that keeps or writes the parameters of a layer, and finds them rather than W + delta."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_inject.core.layers.own_code import OWN


@contextmanager
def keeping(attached: Any, *, replaces: bool = False) -> Iterator[None]:
    """Let the code inside find the parameters of a layer themselves."""
    before = OWN.keeps, OWN.replaces
    OWN.replaces = replaces or (OWN.replaces and OWN.keeps is attached)
    OWN.keeps = attached
    try:
        yield
    finally:
        OWN.keeps, OWN.replaces = before
