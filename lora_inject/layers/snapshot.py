"""All or nothing: what a verb may change on a model, and how to put it back.

One idea: a verb that changes a model photographs, first, what it is about to touch: classes,
parameter tables, mounts, flags and selections, all of them references and no tensor. Whatever
raises, Ctrl-C included, the photograph is put back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_inject.layers.base import mounts_of

__all__ = ["all_or_nothing"]

# What verbs put into a module's __dict__.
KEYS = ("_lora", "_lora_root", "_old_forward", "resize_token_embeddings")
TABLES = ("_parameters", "_load_state_dict_pre_hooks")


@contextmanager
def all_or_nothing(modules: Iterable[nn.Module], values: Iterable[Any] = ()) -> Iterator[None]:
    """Run the body; where it raises, put back what it changed.

    Args:
        modules: The modules that may change.
        values: Further objects whose attributes may change: selections, records.
    """
    distinct = list({id(module): module for module in modules}.values())
    photographs = [_Photograph(module) for module in distinct]
    attributes = [(value, _copied(value.__dict__)) for value in values]
    try:
        yield
    except BaseException:
        for photograph in photographs:
            photograph.restore()
        for value, saved in attributes:
            value.__dict__.clear()
            value.__dict__.update(saved)
        raise


class _Photograph:
    """One module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.cls = type(module)
        self.extras = {key: module.__dict__[key] for key in KEYS if key in module.__dict__}
        self.tables = [(table, dict(module.__dict__[table])) for table in TABLES]
        self.flags = [(p, p.requires_grad) for p in module._parameters.values() if p is not None]
        mounts = mounts_of(module)
        self.mounts = None if mounts is None else _copied(mounts.__dict__)

    def restore(self) -> None:
        module = self.module
        module.__class__ = self.cls
        for key in KEYS:
            module.__dict__.pop(key, None)
        module.__dict__.update(self.extras)
        for table, saved in self.tables:
            module.__dict__[table].clear()
            module.__dict__[table].update(saved)
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)
        mounts = mounts_of(module)
        if mounts is not None and self.mounts is not None:
            mounts.__dict__.clear()
            mounts.__dict__.update(self.mounts)


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copy attributes, and the dicts and sets among them two levels deep."""
    return {key: _copy(value) for key, value in attributes.items()}


def _copy(value: Any) -> Any:
    if type(value) is dict:
        return {k: dict(v) if type(v) is dict else v for k, v in value.items()}
    if type(value) is set:
        return set(value)
    return value
