"""All or nothing: what a verb may change on a model, and how to put it back.

A verb that changes a model snapshots, first, what it is about to touch: classes,
parameter tables, attached, flags and selections, all of them references and no tensor. Whatever
raises, Ctrl-C included, the snapshot is put back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_inject.layers.attached import attached_to

# What verbs put into a module's __dict__.
KEYS = (
    "_lora",
    "_lora_root",
    "_old_forward",
    "_hf_peft_config_loaded",
    "resize_token_embeddings",
    "save_pretrained",
)
TABLES = ("_parameters", "_load_state_dict_pre_hooks")


@contextmanager
def all_or_nothing(modules: Iterable[nn.Module], values: Iterable[Any] = ()) -> Iterator[None]:
    """Run the body; where it raises, put back what it changed.

    Args:
        modules: The modules that may change.
        values: Further objects whose attributes may change: selections, records.
    """
    distinct = list({id(module): module for module in modules}.values())
    snapshots = [_Snapshot(module) for module in distinct]
    trained = {id(parameter) for parameter in _parameters(distinct) if parameter.requires_grad}
    attributes = [(value, _copied(value.__dict__)) for value in values]
    try:
        yield
    except BaseException:
        for snapshot in snapshots:
            snapshot.restore()
        for parameter in _parameters(distinct):
            parameter.requires_grad_(id(parameter) in trained)
        for value, saved in attributes:
            value.__dict__.clear()
            value.__dict__.update(saved)
        raise


def _parameters(modules: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                yield parameter


class _Snapshot:
    """One module."""

    __slots__ = ("attached", "cls", "extras", "module", "tables")

    def __init__(self, module: nn.Module) -> None:
        own = module.__dict__
        self.module = module
        self.cls = type(module)
        there = [key for key in KEYS if key in own]
        if len(there) > 1:  # in the order in which they stand
            there = [key for key in own if key in KEYS]
        self.extras = {key: own[key] for key in there}
        self.tables = [dict(table) if (table := own[name]) else _NOTHING for name in TABLES]
        attached = attached_to(module)
        self.attached = None if attached is None else dict(attached.__dict__)

    def restore(self) -> None:
        module = self.module
        module.__class__ = self.cls
        for key in KEYS:
            module.__dict__.pop(key, None)
        module.__dict__.update(self.extras)
        for name, saved in zip(TABLES, self.tables, strict=True):
            module.__dict__[name].clear()
            module.__dict__[name].update(saved)
        attached = attached_to(module)
        if attached is not None and self.attached is not None:
            attached.__dict__.clear()
            attached.__dict__.update(self.attached)


_NOTHING: Mapping[str, Any] = {}


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copy attributes, and the dicts and sets among them two levels deep."""
    copied = dict(attributes)
    for key, value in attributes.items():
        if type(value) is dict:
            copied[key] = {k: dict(v) if type(v) is dict else v for k, v in value.items()}
        elif type(value) is set:
            copied[key] = set(value)
    return copied
