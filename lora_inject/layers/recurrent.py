"""LSTM, GRU and RNN, which hand their weights to a fused kernel in a list of their own.

The list is read by torch's forward under the name `_flat_weights`, which a swapped class makes a
property: within a forward it holds W + delta, formed there and then, else what torch put into it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from lora_inject.functional.lazy import formed
from lora_inject.layers.readers import running_module

_FLATTENING = nn.RNNBase.flatten_parameters.__code__


def _read(self: Any) -> Any:
    stored = self.__dict__["_flat_weights"]
    if not torch.compiler.is_compiling():
        # Their places in memory are those of the raw weights, whoever asks for them to be moved.
        flattening = sys._getframe(1).f_code is _FLATTENING
        if flattening or running_module() is None:
            return stored
    return _effective(self)


@torch.compiler.disable  # type: ignore[untyped-decorator] # dynamo runs such layers as they are
def _effective(self: Any) -> Any:
    """Return what the kernel gets."""
    return [formed(getattr(self, name, None)) for name in self._flat_weights_names]


def _write(self: Any, weights: list[Any]) -> None:
    self.__dict__["_flat_weights"] = weights


def _update(self: Any) -> None:
    """What torch does where a weight was replaced: here the attributes are read each time."""


MEMBERS = {"_flat_weights": property(_read, _write), "_update_flat_weights": _update}
