"""What somebody replaces after `inject`: parameters with an adapter, and forwards of classes."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from lora_inject.core.layers.attached import GATHERED
from lora_inject.errors import LayerError


def check_replaced(layer: nn.Module, name: str) -> None:
    """Raise if a parameter becomes computed, as in parametrize, prune and weight_norm.

    Wrappers that gather shards or replicate replace them by plain tensors of the same value.
    """
    if not layer.__dict__.keys() & {GATHERED, "_is_replica"}:
        raise LayerError(
            f"replacing parameter {name!r} of a {type(layer).__name__}",
            "it carries an adapter, which a parametrized, pruned, quantized or fused weight "
            "would leave behind, or take in twice",
            "Eject the adapter first, then inject again; or call merge(model, eject=True). To "
            f"change its values, write into layer.get_parameter({name!r})",
        )


def refuse_other_forward(layer: nn.Module) -> NoReturn:
    """Raise for a forward that was put onto the class after `inject`, and would not be called."""
    name = type(layer).__name__
    raise LayerError(
        f"a forward of a {name} with an adapter",
        f"since inject somebody has put another forward onto {name}, which would not be called",
        "Eject, then inject again",
    )
