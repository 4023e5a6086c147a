"""All or nothing: what a verb may change on a model, and how to put it back.

A verb that changes a model first takes a snapshot of the state that it may change: classes, dicts
of attributes, of parameters and of adapters, flags and selections; references only, no tensors. On
any exception, Ctrl-C included, the snapshot is restored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import nn

from lora_inject.core.layers.attached import attached_to


@contextmanager
def all_or_nothing(
    modules: Iterable[nn.Module],
    values: Iterable[object] = (),
    parameters: Iterable[nn.Parameter] | None = None,
) -> Iterator[list[nn.Parameter]]:
    """Run the body; where it raises, put back what it changed of modules and of further values.

    `parameters` are those whose `requires_grad` may change, by default all of the modules'; what is
    yielded are those of them that require a gradient.
    """
    distinct = {id(module): module for module in modules}.values()
    classes = [(module, type(module)) for module in distinct]
    tables = [*chain.from_iterable(map(_tables_of, distinct))]
    tables += chain.from_iterable(map(_tables, values))
    before = [(table, table.copy()) for table in tables]
    if parameters is None:
        parameters = (p for m in distinct for p in m._parameters.values() if p is not None)
    flagged = list(parameters)
    trained = [parameter for parameter in flagged if parameter.requires_grad]
    try:
        yield trained
    except BaseException:
        for module, cls in classes:
            module.__class__ = cls
        for table, held in before:
            table.clear()
            table.update(held)
        flags = {id(parameter) for parameter in trained}
        for parameter in flagged:
            parameter.requires_grad_(id(parameter) in flags)
        raise


def _tables(value: object) -> Iterator[Any]:
    """Yield the dict of an object's attributes, and the dicts and sets among them."""
    yield value.__dict__
    yield from (table for table in value.__dict__.values() if type(table) in (dict, set))


def _tables_of(module: nn.Module) -> list[Any]:
    """Return the dicts and sets of a module that verbs change."""
    parameters: Any = module._parameters
    # A table that offloads is no dict; reading its items would load them.
    held = (parameters,) if isinstance(parameters, dict) else _tables(parameters)
    attached = attached_to(module)
    return [module.__dict__, *held, *([] if attached is None else [attached.__dict__])]
