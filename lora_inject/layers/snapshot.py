"""All or nothing: what a verb may change on a model, and how to put it back.

A verb that changes a model snapshots, first, what it is about to touch: classes,
parameter tables, attached, flags and selections, all of them references and no tensor. Whatever
raises, Ctrl-C included, the snapshot is put back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_inject.layers.attached import attached_to

# What verbs put into a module's __dict__.
KEYS = frozenset(
    (
        "_lora",
        "_lora_root",
        "_old_forward",
        "_hf_peft_config_loaded",
        "resize_token_embeddings",
        "save_pretrained",
    )
)
TABLES = ("_parameters", "_load_state_dict_pre_hooks")


@contextmanager
def all_or_nothing(
    modules: Iterable[nn.Module],
    values: Iterable[Any] = (),
    parameters: Iterable[nn.Parameter] | None = None,
) -> Iterator[list[nn.Parameter]]:
    """Run the body; where it raises, put back what it changed.

    Args:
        modules: The modules that may change.
        values: Further objects whose attributes may change: selections, records.
        parameters: Those whose `requires_grad` may change; by default all of the modules'.

    Yields:
        Those of the parameters that require a gradient.
    """
    distinct = list({id(module): module for module in modules}.values())
    snapshots = [_snapshot(module) for module in distinct]
    if parameters is None:
        parameters = (
            p for module in distinct for p in module._parameters.values() if p is not None
        )
    flagged = list(parameters)
    trained = [parameter for parameter in flagged if parameter.requires_grad]
    attributes = [(value, _copied(value.__dict__)) for value in values]
    try:
        yield trained
    except BaseException:
        for snapshot in snapshots:
            _restore(*snapshot)
        flags = {id(parameter) for parameter in trained}
        for parameter in flagged:
            parameter.requires_grad_(id(parameter) in flags)
        for value, saved in attributes:
            value.__dict__.clear()
            value.__dict__.update(saved)
        raise


def _snapshot(module: nn.Module) -> tuple[Any, ...]:
    """Return what `_restore` takes; of the many modules that carry nothing, it is little."""
    own, attached = module.__dict__, attached_to(module)
    extras = {key: own[key] for key in own if key in KEYS} if not KEYS.isdisjoint(own) else None
    tables = [dict(table) if (table := own[name]) else None for name in TABLES]
    return module, type(module), extras, *tables, attached and dict(attached.__dict__)


def _restore(
    module: nn.Module, cls: type, extras: Any, parameters: Any, hooks: Any, held: Any
) -> None:
    module.__class__ = cls
    for key in KEYS:
        module.__dict__.pop(key, None)
    module.__dict__.update(extras or {})
    for name, saved in zip(TABLES, (parameters, hooks), strict=True):
        module.__dict__[name].clear()
        module.__dict__[name].update(saved or {})
    attached = attached_to(module)
    if attached is not None and held is not None:
        attached.__dict__.clear()
        attached.__dict__.update(held)


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copy attributes, and the dicts and sets among them."""
    return {k: v.copy() if type(v) in (dict, set) else v for k, v in attributes.items()}
