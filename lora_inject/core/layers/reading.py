"""Who reads an adapted parameter, and what it reads as.

The rule: the attribute of an adapted parameter reads as W + delta, for whoever reads it.

| who asks | gets | by |
|---|---|---|
| `parameters()`, `state_dict()`, `_parameters` | the parameter | nn.Module |
| code that keeps or writes the parameters (`own_code`) | the parameter | `read_attribute` |
| a library that moves or rounds a parameter | the parameter | `read_attribute` |
| the forward to whose output the update is added | W, with what is read alone | `_lora_own` |
| a layer whose product cannot be added to | W with all updates | `formed_weight` |
| whoever else reads | W + delta, which cannot be written to | `read_attribute` |

What the sum is stands in `effective`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import nn

from lora_inject.core.functional.factors import needs_plain_operations
from lora_inject.core.functional.read_only import read_only
from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.library import Library, libraries
from lora_inject.core.layers.own_code import OWN
from lora_inject.core.layers.replaced import check_replaced
from lora_inject.errors import LayerError


def read_attribute(layer: Any, param: str, raw: Any) -> Any:
    """Return what the attribute of an adapted parameter reads as.

    Raises:
        LayerError: The sum cannot be formed, or not for this reader.
    """
    try:
        return _read(layer, param, raw)
    except AttributeError as error:
        # nn.Module would answer an AttributeError with the raw weight: an inert adapter.
        raise LayerError(
            f"reading {param!r} of {type(layer).__name__}",
            f"its effective value could not be formed ({error})",
            "This is a defect of the adapter's arithmetic; please report it",
        ) from error


def _read(layer: Any, param: str, raw: Any) -> Any:
    """Return the parameter, or W + delta, by the table above."""
    attached = layer.__dict__.get("_lora")
    if attached is None or OWN.keeps is attached:  # without one the class is next to change
        return raw
    adds = OWN.adds is attached
    entries = _entries(layer, param, with_forward=not adds)
    if not entries:
        return raw
    outside = not adds and not attached.runs_here()
    if outside and not torch.compiler.is_compiling():
        if any(library.moves(layer, param, raw) for library in _movers() if library.is_there()):
            return raw
        if type(raw) is nn.Parameter:
            attached.last_read[param] = ref(raw)
    value = effective_value(layer, param, raw, entries, outside=outside)
    if value is raw or needs_plain_operations():
        return value
    return read_only(value)


@cache
def _movers() -> tuple[Library, ...]:
    return tuple(each for each in libraries() if type(each).moves is not Library.moves)


def effective_value(
    layer: Any, param: str, raw: Any, entries: Mapping[str, Entry], *, outside: bool = False
) -> Any:
    """Return W + delta, with the entries of the current selection."""
    if raw is None:
        check_replaced(layer, param)
    return layer._lora.selection.current().read(layer, param, raw, entries, outside=outside)


def formed_weight(layer: Any) -> Any:
    """Return the weight with all updates, for a product that cannot be added to."""
    attached = layer._lora
    name = layer.weight_name
    entries = {**attached.forward, **attached.reads.get(name, {})}
    return effective_value(layer, name, layer._lora_raw(name), entries)


def _entries(layer: Any, param: str, *, with_forward: bool) -> Mapping[str, Entry]:
    """Return the entries on a parameter, those on the output of the layer as well or not."""
    attached = layer._lora
    reads: Mapping[str, Entry] = attached.reads.get(param, {})
    if not (with_forward and attached.forward and param == layer.weight_name):
        return reads
    return {**attached.forward, **reads}
