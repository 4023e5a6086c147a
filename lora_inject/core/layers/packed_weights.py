"""What is asked of packed weights, and of layers that pack them: the first answer counts.

A kind is one of a library (`Library.packed`), or is registered from outside (`weight_kinds`).
Only those of libraries that this process has loaded are asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.layers.library import loaded_libraries
from lora_inject.core.layers.weight_kinds import (
    OF_ANY_LIBRARY,
    REGISTERED,
    UNKNOWN,
    Reason,
    Verb,
    WeightKind,
)


def loaded_kinds() -> list[WeightKind]:
    """Return the kinds of all libraries that are loaded, those from outside first."""
    return [*REGISTERED, *(kind for library in loaded_libraries() for kind in library.packed)]


def reason_against(verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
    """Return why a verb cannot use a weight, packed or plain, or a layer: the first reason."""
    kinds = (kind for kind in loaded_kinds() if kind.matches(module, weight))
    reasons = (kind.why_not(verb, module, weight) for kind in kinds)
    return next((reason for reason in reasons if reason is not None), None)


def packed_weight(cls: type[nn.Module]) -> str | None:
    """Return the name of the packed weight of a class that is used as an nn.Linear but is none."""
    if issubclass(cls, nn.Linear):
        return None
    names = (kind.weight_of(cls) for kind in loaded_kinds())
    return next((name for name in names if name is not None), None)


def multiplies(cls: type[nn.Module]) -> bool:
    """Return whether the forward of a class is known to multiply by its weight, as nn.Linear's."""
    return any(kind.multiplies(cls) for kind in loaded_kinds())


def begin_training(modules: Iterable[nn.Module]) -> None:
    """Keep packed layers from what would break the gradients of adapters."""
    kinds = loaded_kinds()
    for module in modules if kinds else ():
        for kind in kinds:
            kind.begin_training(module)


def end_training(modules: Iterable[nn.Module]) -> None:
    """Let packed layers do again what they did before the first adapter."""
    kinds = loaded_kinds()
    for module in modules if kinds else ():
        for kind in kinds:
            kind.end_training(module)


def described(weight: Tensor) -> Iterable[str] | None:
    """Return the settings and a few codes of a packed tensor; None if no kind describes it."""
    said = (kind.described(weight) for kind in loaded_kinds())
    return next((each for each in said if each is not None), None)


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
