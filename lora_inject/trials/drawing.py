"""Whether a forward draws random numbers: from torch's generators, Python's or NumPy's.

All trials would share one stream then, and a trial would draw other numbers than alone.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from lora_inject.core.adapter.generators import generators_of


class _Source(NamedTuple):
    """A generator: how to read its state, and how to set it."""

    read: Callable[[], Any]
    write: Callable[[Any], Any]


class Draws:
    """Notes the states of all generators, to see later whether one was used.

    Args:
        devices: The devices whose generators count besides the CPU's.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._sources = [_Source(g.get_state, g.set_state) for g in generators_of(devices)]
        self._sources.append(_Source(random.getstate, random.setstate))
        if "numpy" in sys.modules:  # else nobody can have drawn from it
            numpy: Any = sys.modules["numpy"]
            self._sources.append(_Source(numpy.random.get_state, numpy.random.set_state))
        self._before = [source.read() for source in self._sources]

    def were_used(self) -> bool:
        """Return whether a generator has drawn since; all then go on where they were before."""
        pairs = list(zip(self._sources, self._before, strict=True))
        if all(_plain(source.read()) == _plain(state) for source, state in pairs):
            return False
        for source, state in pairs:
            source.write(state)
        return True


def _plain(state: Any) -> Any:
    """Return a state as values that `==` compares."""
    if isinstance(state, tuple):
        return tuple(_plain(part) for part in state)
    return state.tolist() if hasattr(state, "tolist") else state
