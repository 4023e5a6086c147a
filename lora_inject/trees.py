"""Nested tuples, lists and dicts of values: taken apart, mapped and put together again.

torch's own functions where there are any: they know the classes that libraries register, as
transformers does its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lora_inject.private import look_up


class Structure(NamedTuple):
    """What a tree is without its leaves.

    Attributes:
        kind: The class of the node; None for a leaf.
        keys: The keys of a dict.
        parts: The forms of what is in the node.
    """

    kind: type | None
    keys: tuple[Any, ...] = ()
    parts: tuple[Structure, ...] = ()


def _flatten(tree: Any) -> tuple[list[Any], Structure]:
    kind = type(tree)
    is_named = isinstance(tree, tuple) and hasattr(tree, "_fields")
    if kind not in (tuple, list, dict) and not is_named:
        return [tree], Structure(None)
    keys = tuple(tree) if kind is dict else ()
    leaves, forms = [], []
    for part in tree.values() if kind is dict else tree:
        its_leaves, its_form = _flatten(part)
        leaves += its_leaves
        forms.append(its_form)
    return leaves, Structure(kind, keys, tuple(forms))


def _unflatten(leaves: Sequence[Any], form: Structure) -> Any:
    return _built(iter(leaves), form)


def _built(leaves: Iterator[Any], form: Structure) -> Any:
    if form.kind is None:
        return next(leaves)
    parts = [_built(leaves, part) for part in form.parts]
    if form.kind is dict:
        return dict(zip(form.keys, parts, strict=True))
    return form.kind(*parts) if hasattr(form.kind, "_fields") else form.kind(parts)


def _leaves(tree: Any) -> list[Any]:
    return _flatten(tree)[0]


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    leaves, form = _flatten(tree)
    return _unflatten([function(leaf) for leaf in leaves], form)


def _map_only(kind: type, function: Callable[[Any], Any], tree: Any) -> Any:
    return _map(lambda leaf: function(leaf) if isinstance(leaf, kind) else leaf, tree)


_torch = look_up("torch.utils._pytree")
tree_flatten: Callable[..., Any] = getattr(_torch, "tree_flatten", _flatten)
tree_unflatten: Callable[..., Any] = getattr(_torch, "tree_unflatten", _unflatten)
tree_leaves: Callable[..., list[Any]] = getattr(_torch, "tree_leaves", _leaves)
tree_map: Callable[..., Any] = getattr(_torch, "tree_map", _map)
tree_map_only: Callable[..., Any] = getattr(_torch, "tree_map_only", _map_only)
