"""Classes that somebody has put on top of a swapped one, as `fully_shard` does.

Each is made again on other bases: with another swapped class below it, or with the plain one.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

_PLAIN: WeakValueDictionary[Any, type] = WeakValueDictionary()  # a class lives as long as a module


def without_ours(cls: type, plain_bases: tuple[type, ...]) -> type:
    """Return a class that is above a swapped one, on plain bases: one for each."""
    plain = _PLAIN.get(cls)
    if plain is None:
        plain = _PLAIN[cls] = _on(cls, plain_bases)
    return plain


def with_base(cls: type, old: type, new: type) -> type:
    """Return `cls` with `old` replaced by `new` among its bases, at any depth."""
    if cls is old:
        return new
    if not issubclass(cls, old):
        return cls
    return _on(cls, tuple(with_base(base, old, new) for base in cls.__bases__))


def _on(cls: type, bases: tuple[type, ...]) -> type:
    """Return a class like another, on other bases."""
    namespace = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, namespace)
