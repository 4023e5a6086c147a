"""torchao: subclasses of Tensor in the place of a weight, in a layer of any class."""

from __future__ import annotations

from torch import Tensor, nn

from lora_inject.core.layers.weight_kinds import Reason, Undo, Verb
from lora_inject.quantized.own_values import OfTensor
from lora_inject.quantized.plain_layers import Layer, package_of

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
