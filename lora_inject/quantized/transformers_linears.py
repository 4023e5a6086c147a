"""Linear layers that transformers defines itself, beside those of quantizers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.layers.adapted import defines_forward, plain_class
from lora_inject.core.layers.weight_kinds import OF_VALUES, Reason, Verb, WeightKind
from lora_inject.private import look_up, needed
from lora_inject.quantized.plain_layers import LayerKind

_FINE_GRAINED = ("transformers.integrations.finegrained_fp8", "FP8Linear")
_DEQUANTIZE = "transformers.integrations.finegrained_fp8._dequantize_fp8_weight"
_MULTIPLY = {
    ("transformers.integrations.fbgemm_fp8", "FbgemmFp8Linear"),
    ("transformers.integrations.metal_quantization", "MetalLinear"),
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"),
}


class Multiplies(WeightKind):
    """Layers of which only the forward is known."""

    def multiplies(self, cls: type[nn.Module]) -> bool:
        """Return whether the forward is one of theirs."""
        return defines_forward(cls) in _MULTIPLY


class FineGrainedExperts(WeightKind):
    """`FP8Experts`, stacks in float8 or in 4 bits that kernels multiply with, and their scales."""

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the module is one of them."""
        del weight
        return isinstance(module, getattr(sys.modules[_FINE_GRAINED[0]], "FP8Experts", ()))

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why they get no adapter: the kernels read codes, and scales beside them."""
        if verb == "inject":
            remedy = "Load the base within lora_inject.packed_experts(), which keeps their bits, "
            remedy += "with FineGrainedFP8Config(dequantize=True), or exclude the experts"
            return Reason("experts compute by kernels on codes in 8 or 4 bits", remedy)
        return super().why_not(verb, module, weight)


class FineGrained(LayerKind):
    """`FP8Linear`: float8 with a scale for each block, or one for all."""

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the layer is one, and its weight in 8 bits."""
        plain = plain_class(type(module))
        if weight is None or (plain.__module__, plain.__qualname__) != _FINE_GRAINED:
            return False
        return weight.element_size() == 1

    def multiplies(self, cls: type[nn.Module]) -> bool:
        """Return whether the forward is that of FP8Linear."""
        return defines_forward(cls) == _FINE_GRAINED

    def dense(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Return codes times scales, by transformers' own function."""
        dequantize = needed(_DEQUANTIZE, "the values of weights in block FP8")
        layer: Any = module
        scales, block = layer.weight_scale_inv, layer.block_size
        values: Tensor = dequantize(weight, scales, block, torch.float32)
        return values

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why the values are not known."""
        if verb in OF_VALUES and look_up(_DEQUANTIZE) is None:
            return Reason(f"this version of transformers has no {_DEQUANTIZE}")
        return super().why_not(verb, module, weight)


_KERNELS = "transformers.integrations.mxfp4"


class KernelExperts(WeightKind):
    """`Mxfp4GptOssExperts`, whose matmul_ogs launches kernels into a new tensor."""

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the module is one of them."""
        return isinstance(module, getattr(sys.modules[_KERNELS], "Mxfp4GptOssExperts", ()))

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why nothing below them trains, and why they get no adapter."""
        if verb in ("inject", "train"):
            remedy = "Load the base within lora_inject.packed_experts(), which keeps 4 bits, "
            remedy += "or with Mxfp4Config(dequantize=True)"
            return Reason("experts compute in MXFP4 by kernels for inference", remedy)
        return super().why_not(verb, module, weight)


# What it leaves on the model and on its config.
_ON_MODEL = ("hf_quantizer", "is_quantized", "quantization_method")
_ON_CONFIG = ("quantization_config", "_pre_quantization_dtype", "_is_quantized")


class Quantized(WeightKind):
    """Matches no weight: it knows models."""

    def claims(self, module: nn.Module) -> Iterator[tuple[Any, tuple[str, ...]]]:
        """Yield a model with a quantizer, and its config."""
        if "hf_quantizer" in module.__dict__:
            yield module, _ON_MODEL
            if (config := getattr(module, "config", None)) is not None:
                yield config, _ON_CONFIG
