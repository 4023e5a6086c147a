"""Layers of a quantizer's own class that become torch's, and become what they were again.

A layer stays the same object: its class, attributes, Parameters and buffers are exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.layers.adapted import plain_class
from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.survey import base_parameters
from lora_inject.core.layers.swap import OLD_FORWARD, become, own_class, point_hook
from lora_inject.core.layers.weight_kinds import Reason, Undo, Verb, WeightKind, in_dtype

# Attributes that others leave on a layer, whatever its class: hooks, adapters.
_KEPT = ("forward", "_lora", "_hf_", OLD_FORWARD, "_is_")


@dataclass
class Layer:
    """The state of a layer before its packed weight was replaced."""

    module: nn.Module
    plain: type[nn.Module]
    attributes: dict[str, Any]
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]

    @classmethod
    def of(cls, module: nn.Module) -> Layer:
        """Note the state of a layer; attributes that will be gone are added by the caller."""
        parameters, buffers = dict(module._parameters), dict(module._buffers)
        return cls(module, plain_class(type(module)), {}, parameters, buffers)

    def put_back(self) -> None:
        """Give the layer its own class, attributes, Parameters and buffers back."""
        self.module.__dict__.update(self.attributes)
        self.module._parameters.clear()
        self.module._parameters.update(self.parameters)
        self.module._buffers.update(self.buffers)
        _change_plain_class(self.module, self.plain)  # whose reads depend on what is held


class LayerKind(WeightKind):
    """A weight in a layer whose class is the quantizer's own: both are exchanged."""

    def replaces_layer(self, module: nn.Module, weight: Tensor) -> bool:
        """Return True."""
        return True

    def write(self, module: nn.Module, key: str, weight: nn.Parameter) -> Undo:
        """Make the layer one of torch's."""
        return become_plain(module, weight)

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why the class cannot change."""
        if verb == "replace":
            return why_class_is_fixed(module)
        return super().why_not(verb, module, weight)


def package_of(cls: type) -> str:
    """Return the name of the library that defines a class."""
    return cls.__module__.partition(".")[0]


def torch_class(plain: type) -> type[nn.Module]:
    """Return what a quantizer's class stands for: what it derives from outside its library.

    It is nn.Linear where that is nn.Module alone.

    Examples:
        >>> class Packed(nn.Embedding):
        ...     pass
        >>> torch_class(Packed)
        <class 'torch.nn.modules.sparse.Embedding'>
    """
    library = package_of(plain)
    outside = (c for c in plain.__mro__ if issubclass(c, nn.Module) and package_of(c) != library)
    cls = next(outside)
    return nn.Linear if cls is nn.Module else cls


def why_class_is_fixed(module: nn.Module) -> Reason | None:
    """Return why a layer cannot become one of torch's; None if Python allows it."""
    plain: Any = plain_class(type(module))
    try:
        plain.__new__(plain).__class__ = torch_class(plain)
    except TypeError:
        problem = f"the weight is quantized, and its {plain.__name__} of {plain.__module__} has a "
        problem += "memory layout of its own and cannot become an nn.Linear"
        remedy = "Load dict(merged_weights(model, dequantize=...)) into the base in 16 bits"
        return Reason(problem, remedy)
    return None


def become_plain(module: nn.Module, weight: nn.Parameter) -> Layer:
    """Make a layer one of torch's, whose Parameters are `weight`, its bias and the adapters.

    Attributes that a layer of torch's has not are removed, but for those of hooks and adapters.
    """
    before, own = Layer.of(module), module.__dict__
    target = torch_class(before.plain)
    blank = _blank(target)  # type: ignore[arg-type]
    alone = {name for name in own.keys() - blank.__dict__.keys() if not name.startswith(_KEPT)}
    base = base_parameters(module)
    adapters = {name: p for name, p in module._parameters.items() if name not in base}
    held: dict[str, Any] = {**before.buffers, **before.parameters}
    bias = own["bias"] if "bias" in alone else held.get("bias")
    _change_plain_class(module, target)
    before.attributes = {name: own.pop(name) for name in sorted(alone)}
    module._parameters.clear()
    module._parameters["weight"] = weight
    if "bias" in blank._parameters:
        module._parameters["bias"] = None if bias is None else in_dtype(bias, weight.dtype)
    module._parameters.update(adapters)
    module._buffers.clear()
    return before


@cache
def _blank(cls: Any) -> nn.Module:
    """Return a layer of a class, on meta."""
    with torch.device("meta"):
        return cls(1, 1)  # type: ignore[no-any-return]


def _change_plain_class(module: nn.Module, plain: type[nn.Module]) -> None:
    """Give a module, with or without adapters, another class of the same layout."""
    attached = attached_to(module)
    if attached is not None:
        become(module, plain, own_class(type(module))._lora_mixin, attached.reads)
        return
    point_hook(module, plain.forward)
    module.__class__ = plain
