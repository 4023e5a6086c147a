"""All or nothing: what a verb may change on a model, and how to put it back.

A verb that changes a model first takes a snapshot of the state that it may change: classes, tables
of parameters and adapters, flags and selections; references only, no tensors. On any exception,
Ctrl-C included, the snapshot is restored. For tables that only grow, the length is enough, so the
thousandth adapter costs no more than the first.
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
        "create_or_update_model_card",
        "_hf_peft_config_loaded",
        "resize_token_embeddings",
        "save_pretrained",
        "support_avx512bf16_for_cpu",
    )
)


@contextmanager
def all_or_nothing(
    modules: Iterable[nn.Module],
    values: Iterable[Any] = (),
    parameters: Iterable[nn.Parameter] | None = None,
    *,
    grows: bool = False,
) -> Iterator[list[nn.Parameter]]:
    """Run the body; where it raises, put back what it changed of modules and of further values.

    `parameters` are those whose `requires_grad` may change, by default all of the modules'; what is
    yielded are those of them that require a gradient. `grows` promises that modules only get
    adapters, and nothing is removed or replaced.
    """
    distinct = list({id(module): module for module in modules}.values())
    snapshots = [_snapshot(module, grows) for module in distinct]
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


def _snapshot(module: nn.Module, grows: bool) -> tuple[Any, ...]:
    """Return what `_restore` takes; of the many modules that carry nothing, it is little."""
    own, attached = module.__dict__, attached_to(module)
    extras = {key: own[key] for key in own if key in KEYS} if not KEYS.isdisjoint(own) else None
    tables, attributes = [own["_parameters"]], None
    if attached is not None:
        tables += [attached.forward, *attached.reads.values()]
        attributes = {**attached.__dict__, "reads": dict(attached.reads)}
    noted = [(table, len(table) if grows or not table else dict(table)) for table in tables]
    return module, type(module), extras, attributes, noted


def _restore(module: nn.Module, cls: type, extras: Any, attributes: Any, tables: Any) -> None:
    module.__class__ = cls
    for key in KEYS:
        module.__dict__.pop(key, None)
    module.__dict__.update(extras or {})
    if attributes is not None:
        held = attached_to(module).__dict__
        held.clear()
        held.update(attributes)
    for table, noted in tables:
        if isinstance(noted, dict):
            table.clear()
            table.update(noted)
        while isinstance(noted, int) and len(table) > noted:
            table.popitem()


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copy attributes, and the dicts and sets among them."""
    return {k: v.copy() if type(v) in (dict, set) else v for k, v in attributes.items()}
