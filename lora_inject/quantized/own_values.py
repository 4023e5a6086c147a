"""Packed weights of whatever library that say their values: by a `dequantize` of their own.

It is a method of the tensor's class, or one of the layer's class.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_inject.core.layers.adapted import defines_forward, plain_class
from lora_inject.core.layers.plain_tensors import is_quantized
from lora_inject.core.layers.weight_kinds import Reason, Undo, Verb, WeightKind
from lora_inject.quantized.plain_layers import (
    Layer,
    LayerKind,
    become_plain,
    package_of,
    why_class_is_fixed,
)


class OfTensor(WeightKind):
    """A tensor whose class has a `dequantize` of its own.

    Where the layer's class comes from the same library the layer is exchanged, else the weight
    alone, in any layer.
    """

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the tensor's class has it."""
        if weight is None or type(weight).dequantize is Tensor.dequantize:
            return False
        return is_quantized(weight)

    def dense(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Return what the tensor says."""
        values: Tensor = weight.dequantize()
        return values

    def replaces_layer(self, module: nn.Module, weight: Tensor) -> bool:
        """Return whether the classes of layer and tensor come from one library."""
        return package_of(plain_class(type(module))) == package_of(type(weight))

    def write(self, module: nn.Module, key: str, weight: nn.Parameter) -> Undo:
        """Replace the layer, or the weight alone."""
        if self.replaces_layer(module, module._parameters[key]):  # type: ignore[arg-type]
            return become_plain(module, weight)
        return super().write(module, key, weight)

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why a layer cannot be replaced, or its weight be packed again in memory."""
        remedy = getattr(weight, "packed_again_by", "")
        if verb == "requantize" and remedy:
            return Reason("its format is not quantized again in memory", remedy)
        if verb == "replace" and weight is not None and self.replaces_layer(module, weight):
            return why_class_is_fixed(module)
        return super().why_not(verb, module, weight)


class OfLayer(LayerKind):
    """A layer whose class has a `dequantize`."""

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the layer's class has it."""
        method = getattr(plain_class(type(module)), "dequantize", None)
        return callable(method) and weight is not None and is_quantized(weight)

    def dense(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Return what the layer says."""
        layer: Any = module
        values: Tensor = layer.dequantize()
        return values


class HQQ(OfLayer):
    """An `HQQLinear`, whose bias is an attribute.

    Source: `hqq/core/quantize.py`.
    """

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the layer is one of HQQ's, and the tensor its codes."""
        return self.weight_of(type(module)) is not None and super().matches(module, weight)

    def weight_of(self, cls: type[nn.Module]) -> str | None:
        """Return `W_q`."""
        names = ((c.__module__, c.__qualname__) for c in cls.__mro__)
        return "W_q" if ("hqq.core.quantize", "HQQLinear") in names else None


class Quanto(OfTensor):
    """A `QLinear`, and its tensors.

    Source: `optimum/quanto/nn/qlinear.py`.
    """

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the tensor's class is quanto's."""
        of_quanto = type(weight).__module__.startswith("optimum.quanto.")
        return of_quanto and super().matches(module, weight)

    def multiplies(self, cls: type[nn.Module]) -> bool:
        """Return whether the forward is that of QLinear."""
        return defines_forward(cls) == ("optimum.quanto.nn.qlinear", "QLinear")


# What its tensors call the quantization of activations: Int8Tensor and Float8Tensor,
# IntxUnpackedToInt8Tensor.
_DYNAMIC = ("act_quant_kwargs", "activation_quantization")


class TorchAO(OfTensor):
    """Any tensor of torchao's."""

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the tensor's class is torchao's."""
        return weight is not None and package_of(type(weight)) == "torchao"

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why no adapter can train: some of its tensors quantize activations."""
        dynamic = any(getattr(weight, key, None) is not None for key in _DYNAMIC)
        if verb == "train" and dynamic:
            problem = f"{type(weight).__name__} quantizes activations as it runs"
            return Reason(problem, "Quantize the weights only (torchao: Int8WeightOnlyConfig)")
        return super().why_not(verb, module, weight)

    def write(self, module: nn.Module, key: str, weight: nn.Parameter) -> Undo:
        """Replace the weight, and remove the `extra_repr` that torchao sets on a layer."""
        before = Layer.of(module)
        super().write(module, key, weight)
        if "extra_repr" in module.__dict__:
            before.attributes["extra_repr"] = module.__dict__.pop("extra_repr")
        return before
