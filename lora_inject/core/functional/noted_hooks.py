"""Hooks on saved tensors where torch does not tell of them (before 2.8): who enters some is noted.

It is noted while modules have adapters. What was entered before is not known, nor what C++ code
enters.
"""

from __future__ import annotations

import threading
from typing import Any

from torch.autograd.graph import saved_tensors_hooks

from lora_inject.core.functional.patches import patch


class _Entered(threading.local):
    """The hooks that the calling thread has entered, the innermost last."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Any, Any]] = []


_ENTERED = _Entered()


def note_saving_hooks() -> None:
    """Note, while modules have adapters, who enters hooks on saved tensors."""
    patch(saved_tensors_hooks, "__enter__", _noted)
    patch(saved_tensors_hooks, "__exit__", _forgotten)


def _noted(enter: Any) -> Any:
    """Return what enters hooks."""

    def entering(self: Any) -> None:
        enter(self)
        _ENTERED.pairs.append((self.pack_hook, self.unpack_hook))

    return entering


def _forgotten(leave: Any) -> Any:
    """Return what leaves hooks."""

    def leaving(self: Any, *raised: object) -> None:
        if _ENTERED.pairs:
            _ENTERED.pairs.pop()
        leave(self, *raised)

    return leaving


def innermost_noted(_: bool) -> tuple[Any, Any] | None:
    """Return the innermost hooks, in the place of torch's own function, with its argument."""
    return _ENTERED.pairs[-1] if _ENTERED.pairs else None


def noted_hooks() -> list[tuple[Any, Any]]:
    """Return the hooks that the caller runs in, the innermost first."""
    return _ENTERED.pairs[::-1]
