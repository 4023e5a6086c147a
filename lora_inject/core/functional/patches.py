"""Functions of torch that are others while modules have adapters.

A patch is for what torch has no hook for. It is stated where it is explained, put in with the first
selection of the process, and taken back with the last.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

_ABSENT = object()  # a class inherits the function

Place = tuple[type | ModuleType, str]
"""What has a function, and its name there."""

_PATCHES: dict[Place, Callable[[Callable[..., Any]], object]] = {}
_IN_PLACE: dict[Place, tuple[object, object]] = {}  # torch's own function, and ours
_HOLDERS: weakref.WeakSet[object] = weakref.WeakSet()
_CHANGING = threading.RLock()  # a holder may go while the same thread puts patches in


def patch(
    owner: type | ModuleType, name: str, wrap: Callable[[Callable[..., Any]], object]
) -> None:
    """Have `wrap(function)` in the place of a function of torch while anything holds patches."""
    _PATCHES[owner, name] = wrap


def hold(holder: object) -> None:
    """Have the patches in place for as long as an object lives."""
    _HOLDERS.add(holder)
    weakref.finalize(holder, _let_go)
    _put_in()


def _held() -> bool:
    references = _HOLDERS.data.copy()  # type: ignore[attr-defined]  # other threads may add one
    return any(reference() is not None for reference in references)


def _put_in() -> None:
    with _CHANGING:
        for (owner, name), wrap in _PATCHES.items():
            if (owner, name) not in _IN_PLACE:
                ours = wrap(getattr(owner, name))
                _IN_PLACE[owner, name] = owner.__dict__.get(name, _ABSENT), ours
                setattr(owner, name, ours)


def _let_go() -> None:
    """Give torch its own functions after the last holder, but for those that somebody wraps."""
    with _CHANGING:
        for (owner, name), (own, ours) in [] if _held() else list(_IN_PLACE.items()):
            if owner.__dict__.get(name) is ours:
                del _IN_PLACE[owner, name]
                if own is _ABSENT:
                    delattr(owner, name)
                else:
                    setattr(owner, name, own)
