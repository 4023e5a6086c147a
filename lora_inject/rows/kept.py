"""Which adapters can be others for each row, by what they are on a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.linear_kinds import LoRALinear
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import Reach, adapted_modules, reach
from lora_inject.core.spec.names import joined
from lora_inject.rows.convolution import adds_rows

_ROWWISE = {nn.Linear.forward, nn.LayerNorm.forward, nn.RMSNorm.forward}
"""Forwards that treat the rows of their input alike."""

_WHOLE: WeakKeyDictionary[Reach, Mapping[str, str]] = WeakKeyDictionary()


def adds_bias(cls: Any, param: str) -> bool:
    """Whether what a swapped class reads as its bias can be added to its output for each row."""
    return param == "bias" and issubclass(cls._lora_mixin, LoRALinear)


def is_rowwise(plain: Any) -> bool:
    """Whether a class treats the rows of its input alike."""
    return plain.forward in _ROWWISE


def routes_rows(module: nn.Module, entry: Entry) -> bool:
    """Whether an adapter that reads a parameter of a module can be another for each row."""
    cls: Any = type(module)
    if entry.spec is not None:
        return not entry.variant.gained and adds_rows(cls._lora_plain, entry.param)
    if adds_bias(cls, entry.param):
        return True
    return entry.rows is None and entry.scale is None and is_rowwise(cls._lora_plain)


def read_whole(model: nn.Module) -> Mapping[str, str]:
    """Return the adapters that change what all rows of a batch share, with such a parameter.

    The answer is kept until the next inject or eject.
    """
    found = reach(model)
    known = _WHOLE.get(found)
    if known is None:
        known = _WHOLE[found] = {
            entry.adapter: joined(path, entry.param)
            for path, module, attached in adapted_modules(Survey(model))
            for table in attached.reads.values()
            for entry in table.values()
            if not routes_rows(module, entry)
        }
    return known
