"""LSTM, GRU and RNN: what their fused kernel is handed.

Torch hands the kernel a list of weights that it keeps under the name `_flat_weights`, a property of
the swapped class. It reads as W + delta, formed there and then. Torch's own bookkeeping, which
arranges the Parameters in memory, finds the list of these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_inject.core.functional.lazy import formed
from lora_inject.core.layers.attached import Carrier, attached_to
from lora_inject.core.layers.reading import OWN, keeping


def _effective(self: nn.RNNBase) -> list[Any]:
    """Return what the kernel gets."""
    return [formed(getattr(self, name, None)) for name in self._flat_weights_names]


def _write(self: nn.RNNBase, weights: list[Any]) -> None:
    """Keep the Parameters, whatever was read of them to make the list."""
    held, names = self._parameters, self._flat_weights_names
    kept = (held.get(name, given) for name, given in zip(names, weights, strict=False))
    self.__dict__["_flat_weights"] = list(kept)


def _update(self: nn.RNNBase) -> None:
    """What torch does where a weight was replaced: here the attributes are read each time."""


def _bookkeeping(method: str) -> Callable[..., Any]:
    """Return a method of torch's that looks after the Parameters."""

    @functools.wraps(getattr(nn.RNNBase, method))
    def run(self: Carrier, *args: Any) -> Any:
        plain = getattr(self._lora_plain, method)
        attached = attached_to(self)
        if attached is None:
            return plain(self, *args)
        with keeping(attached):
            return plain(self, *args)

    # Dynamo would follow it in part, and read W + delta in the rest.
    return torch.compiler.disable(run)  # type: ignore[no-any-return, no-untyped-call]


def members_of_recurrent() -> dict[str, Any]:
    """Return the members of the swapped class of an LSTM, GRU or RNN.

    A function, as `torch.compiler.disable` imports dynamo when it decorates, which takes a second.
    """
    # Dynamo runs such layers as they are.
    effective = torch.compiler.disable(_effective)  # type: ignore[no-untyped-call]

    def flat_weights(self: Any) -> Any:
        return self.__dict__["_flat_weights"] if OWN.keeps is self._lora else effective(self)

    return {
        "_flat_weights": property(flat_weights, _write),
        "_update_flat_weights": _update,
        "_init_flat_weights": _bookkeeping("_init_flat_weights"),
        "flatten_parameters": _bookkeeping("flatten_parameters"),
        "__setattr__": _bookkeeping("__setattr__"),
    }
