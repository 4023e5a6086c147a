"""Ways in which a weight is held packed, and what the verbs ask of each.

The core knows none of the libraries that
pack weights: what is known of one is a subclass of `WeightKind` in a file named after it, with a
row in `WEIGHT_KINDS` (`core/spec/rooms.py`). The file is imported only if the library is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lora_inject.core.spec.rooms import WEIGHT_KINDS, WEIGHT_KINDS_OF_ANY, the_one

Verb = Literal["inject", "train", "norms", "merge", "dequantize", "replace", "requantize"]
"""What somebody wants to do with a weight.

| verb | what it needs |
|---|---|
| `inject` | an adapter on the layer |
| `train` | a gradient from the layer's output to its input |
| `norms` | the norms of the values, in each forward |
| `merge` | a sum in a weight that is not packed, by a layer that may pack it again |
| `dequantize` | the values |
| `replace` | the values as the weight of the layer itself |
| `requantize` | the values, packed again in the same way |
"""

OF_VALUES = ("norms", "dequantize", "requantize")
"""The verbs that need the values."""
_MERGE_BEFORE = "Load the adapter onto the base in 16 bits and merge there"


class Reason(NamedTuple):
    """Why a verb cannot use a weight."""

    found: str
    remedy: str = _MERGE_BEFORE


class Undo(Protocol):
    """What a write to a packed weight keeps."""

    def put_back(self) -> None:
        """Restore the layer, with the very objects that it had."""


@dataclass
class ReplacedParameters:
    """The Parameters of a module before one of them was replaced."""

    module: nn.Module
    before: dict[str, nn.Parameter | None]

    def put_back(self) -> None:
        """Restore the Parameters, in their order."""
        self.module._parameters.clear()
        self.module._parameters.update(self.before)


class WeightKind:
    """One way in which weights are held: what is known of a library's tensors and layers.

    A subclass overrides what it knows. What it leaves is a refusal: a kind without `dense` cannot
    be merged, one without `packed` cannot be quantized again. There is one object of each class,
    without a state.

    Examples:
        >>> class Halves(WeightKind):
        ...     def matches(self, module, weight):
        ...         return hasattr(module, "step")
        ...
        ...     def dense(self, module, weight):
        ...         return weight * module.step
        >>> layer = nn.Linear(2, 1)
        >>> layer.step, codes = 0.5, torch.tensor([[2, 3]], dtype=torch.int8)
        >>> Halves().matches(layer, codes), Halves().dense(layer, codes).tolist()
        (True, [[1.0, 1.5]])
        >>> Halves().why_not("requantize", layer, codes).found
        'its format cannot be quantized again'
    """

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether a weight is held in this way by its layer.

        Args:
            module: The layer, with or without adapters.
            weight: A parameter or buffer of it; None if the question is about the layer.
        """
        del module, weight
        return False

    def dense(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Return the values of a weight in the shape that its layer states, in any float dtype."""
        raise NotImplementedError

    def packed(self, module: nn.Module, weight: Tensor, values: Tensor) -> nn.Parameter:
        """Return a weight in the format of `weight`, for float32 values of its layer."""
        raise NotImplementedError

    def replaces_layer(self, module: nn.Module, weight: Tensor) -> bool:
        """Return whether an unpacked layer becomes one of torch's, with a `weight` and a `bias`."""
        del module, weight
        return False

    def write(self, module: nn.Module, key: str, weight: nn.Parameter) -> Undo:
        """Put another weight, plain or packed in the same way, in the place of `key`.

        A bias that is added to products with a plain weight gets its dtype.
        """
        before = ReplacedParameters(module, dict(module._parameters))
        module._parameters[key] = weight
        bias = module._parameters.get("bias")
        if key == "weight" and bias is not None and type(weight) is nn.Parameter:
            module._parameters["bias"] = in_dtype(bias, weight.dtype)
        return before

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why a verb cannot use a weight that matches, and what to do; None if it can."""
        del weight
        kind = type(self)
        if verb in OF_VALUES and kind.dense is WeightKind.dense:
            plain = getattr(type(module), "_lora_plain", type(module))
            found = f"dequantizing a {plain.__name__} of {plain.__module__} is not supported"
            return Reason(found)
        if verb == "requantize" and kind.packed is WeightKind.packed:
            return Reason("its format cannot be quantized again")
        return None

    # Of classes of layers -----------------------------------------------------------------------

    def weight_of(self, cls: type[nn.Module]) -> str | None:
        """Return the name of the packed weight of a class that is used as an nn.Linear but is none.

        It is the name of a parameter or of a buffer. None for all other classes.
        """
        del cls
        return None

    def multiplies(self, cls: type[nn.Module]) -> bool:
        """Return whether the forward of a class multiplies x by the values, and does nothing else.

        Then an update is added to its output. It may add a bias.
        """
        return self.weight_of(cls) is not None

    # Around verbs -------------------------------------------------------------------------------

    def begin_training(self, module: nn.Module) -> None:
        """Keep a layer from what would break the gradients of adapters; called for every module."""

    def end_training(self, module: nn.Module) -> None:
        """Undo `begin_training`, as the last adapter is gone."""

    def claims(self, module: nn.Module) -> Iterable[tuple[Any, Iterable[str]]]:
        """Yield who says that a model is packed, and by which attributes: untrue once none is."""
        del module
        return ()

    def described(self, weight: Tensor) -> Iterable[str] | None:
        """Return the settings and a few codes of a tensor, to recognize a base; None if unknown."""
        del weight
        return None


UNKNOWN = WeightKind()
"""What nobody knows how to unpack."""


REGISTERED: list[WeightKind] = []
"""Kinds from outside, asked before the rows, the newest first."""


def register_weight_kind(kind: type[WeightKind]) -> type[WeightKind]:
    """Add a kind of weight from outside.

    Args:
        kind: The class; one object of it is made.

    Returns:
        The class, so that this can be used as a decorator.

    Examples:
        >>> _ = register_weight_kind(WeightKind)
        >>> del REGISTERED[0]
    """
    REGISTERED.insert(0, kind())
    return kind


def loaded_kinds() -> list[WeightKind]:
    """Return the kinds of all libraries that are loaded, those from outside first."""
    modules = sys.modules  # asked for each layer of a model
    kinds = [the_one(path) for library, path in WEIGHT_KINDS if library in modules]
    return [*REGISTERED, *kinds]


def weight_kind(module: nn.Module, weight: Tensor) -> WeightKind:
    """Return how a layer holds a packed weight; `UNKNOWN` if nobody knows."""
    for kind in loaded_kinds():
        if kind.matches(module, weight):
            return kind
    own = (the_one(path) for path in WEIGHT_KINDS_OF_ANY)
    return next((kind for kind in own if kind.matches(module, weight)), UNKNOWN)


def reason_against(verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
    """Return why a verb cannot use a weight, packed or plain, or a layer: the first reason."""
    kinds = (kind for kind in loaded_kinds() if kind.matches(module, weight))
    reasons = (kind.why_not(verb, module, weight) for kind in kinds)
    return next((reason for reason in reasons if reason is not None), None)


@torch.no_grad()
def dense(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the values that a packed weight stands for in its layer, as new float32."""
    values = weight_kind(module, weight).dense(module, weight)
    return values.to(torch.float32).contiguous()


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


def claims(modules: Iterable[nn.Module]) -> list[tuple[Any, dict[str, Any]]]:
    """Return who says that it is quantized, with the attributes that say it."""
    return [
        (owner, {name: owner.__dict__[name] for name in names if name in owner.__dict__})
        for module in modules
        for kind in loaded_kinds()
        for owner, names in kind.claims(module)
    ]


def described(weight: Tensor) -> Iterable[str] | None:
    """Return the settings and a few codes of a packed tensor; None if no kind describes it."""
    said = (kind.described(weight) for kind in loaded_kinds())
    return next((each for each in said if each is not None), None)


def defines_forward(cls: type) -> tuple[str, str]:
    """Return the module and the name of the class whose `forward` a class has."""
    owner = next(c for c in cls.__mro__ if "forward" in c.__dict__)
    return owner.__module__, owner.__qualname__


def in_dtype(bias: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """Return a bias as a Parameter of a dtype: itself if it is one."""
    if isinstance(bias, nn.Parameter) and bias.dtype == dtype:
        return bias
    return nn.Parameter(bias.detach().to(dtype), bias.requires_grad)
