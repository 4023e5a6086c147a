"""What a packed weight stands for, and how its layer holds it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.layers.packed_weights import loaded_kinds
from lora_inject.core.layers.weight_kinds import OF_ANY_LIBRARY, UNKNOWN, WeightKind


def weight_kind(module: nn.Module, weight: Tensor) -> WeightKind:
    """Return how a layer holds a packed weight; `UNKNOWN` if nobody knows."""
    kind = _known_kind(module, weight)
    return UNKNOWN if kind is None else kind


def is_known(module: nn.Module, weight: Tensor) -> bool:
    """Return whether a kind knows how a layer holds a packed weight."""
    return _known_kind(module, weight) is not None


def _known_kind(module: nn.Module, weight: Tensor) -> WeightKind | None:
    for kind in loaded_kinds():
        if kind.matches(module, weight):
            return kind
    return next((kind for kind in OF_ANY_LIBRARY if kind.matches(module, weight)), None)


@torch.no_grad()
def dense(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the values that a packed weight stands for in its layer, as new float32."""
    values = weight_kind(module, weight).dense(module, weight)
    return values.to(torch.float32).contiguous()


def claims(modules: Iterable[nn.Module]) -> list[tuple[Any, dict[str, Any]]]:
    """Return who says that it is quantized, with the attributes that say it."""
    return [
        (owner, {name: owner.__dict__[name] for name in names if name in owner.__dict__})
        for module in modules
        for kind in loaded_kinds()
        for owner, names in kind.claims(module)
    ]
