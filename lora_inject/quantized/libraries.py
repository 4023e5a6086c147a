"""How each library holds weights packed, but for bitsandbytes: a class for each of its ways."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lora_inject.core.functional.torch_inside import module_calling
from lora_inject.core.layers.adapted import READER, plain_class
from lora_inject.core.layers.library import Library
from lora_inject.core.layers.weight_kinds import (
    OF_VALUES,
    Reason,
    Undo,
    Verb,
    WeightKind,
    defines_forward,
    derives_from,
    is_quantized,
)
from lora_inject.quantized.codes import float8_values
from lora_inject.quantized.plain_layers import (
    Layer,
    LayerKind,
    become_plain,
    package_of,
    why_class_is_fixed,
)

# ------------------------------------------- whatever library: a `dequantize` of tensor or layer


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
        """Return why a layer cannot be replaced."""
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
    """An `HQQLinear` with its codes `W_q`, whose bias is an attribute.

    Its `backend` names the forward of all layers; those with a backward are `..._backprop`, the
    default. Source: `hqq/core/quantize.py`.
    """

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the layer is one of HQQ's, and the tensor its codes."""
        return self.weight_of(type(module)) is not None and super().matches(module, weight)

    def weight_of(self, cls: type[nn.Module]) -> str | None:
        """Return `W_q`."""
        return "W_q" if derives_from(cls, "hqq.core.quantize", "HQQLinear") else None

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why no adapter can train: the backend has no backward."""
        if verb != "train":
            return super().why_not(verb, module, weight)
        layer: Any = module
        if "backprop" in layer.backend.value:
            return None
        problem = f"{plain_class(type(module)).__name__} runs {layer.backend.value}, for inference"
        return Reason(problem, "Call HQQLinear.set_backend(HQQBackend.PYTORCH_BACKPROP)")


class Quanto(OfTensor):
    """The tensors of a `QLinear`, before whose nn.Linear stands a class with a layout of its own.

    Source: `optimum/quanto/nn/qlinear.py`.
    """

    trains = True  # optimum/quanto/nn/qlinear.py: QLinearFunction
    against: ClassVar[Mapping[Verb, Reason]] = {
        "inject": Reason(
            "Python lets no module of optimum-quanto change its class",
            "Quantize the base with bitsandbytes or torchao, or exclude the layer",
        )
    }

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the tensor's class is quanto's."""
        of_quanto = type(weight).__module__.startswith("optimum.quanto.")
        return of_quanto and super().matches(module, weight)

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why no adapter can train: activations may be quantized."""
        if verb == "train" and getattr(module, "activation_qtype", None) is not None:
            problem = f"{plain_class(type(module)).__name__} quantizes activations as it runs"
            return Reason(problem, "Quantize the weights only")
        return super().why_not(verb, module, weight)


# What its tensors call the quantization of activations: Int8Tensor and Float8Tensor,
# IntxUnpackedToInt8Tensor.
_DYNAMIC = ("act_quant_kwargs", "activation_quantization")
# Those that multiply by their values, or by a Function with a backward. Those of 4 bits multiply by
# kernels that have none (torchao 0.18, quantization/quantize_/workflows).
_WITH_BACKWARD = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor", "NF4Tensor")


class TorchAO(OfTensor):
    """Any tensor of torchao's."""

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the tensor's class is torchao's."""
        return weight is not None and package_of(type(weight)) == "torchao"

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why no adapter can train: some of its tensors have no backward."""
        if verb != "train":
            return super().why_not(verb, module, weight)
        name, remedy = type(weight).__name__, "(torchao: Int8WeightOnlyConfig)"
        if any(getattr(weight, key, None) is not None for key in _DYNAMIC):
            problem = f"{name} quantizes activations as it runs"
            return Reason(problem, f"Quantize the weights only {remedy}")
        if name not in _WITH_BACKWARD:
            problem = f"{name} of torchao is packed, and its backward is not known"
            return Reason(problem, f"Quantize the weights in another format {remedy}")
        return None

    def write(self, module: nn.Module, key: str, weight: nn.Parameter) -> Undo:
        """Replace the weight, and remove the `extra_repr` that torchao sets on a layer."""
        before = Layer.of(module)
        super().write(module, key, weight)
        if "extra_repr" in module.__dict__:
            before.attributes["extra_repr"] = module.__dict__.pop("extra_repr")
        return before


# ------------------------------------------------------------------------------ compressed-tensors

_PACKAGES = ("compressed_tensors.", "transformers.integrations.compressed_tensors")
_ACTIVATIONS = ("input_activations", "output_activations")


class CompressedWeights(WeightKind):
    """Every weight of a layer with a `quantization_scheme`."""

    forwards = (("transformers.integrations.compressed_tensors", "CompressedTensorsFP8Linear"),)
    trains = True  # plain layers, which multiply by unpacked or rounded weights

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the layer has a scheme."""
        return hasattr(module, "quantization_scheme")

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why a weight is not there yet, holds no sum, or passes no gradient."""
        scheme = getattr(module, "quantization_scheme", None)
        if verb == "inject" and weight is None:
            problem = "compressed-tensors unpacks its weight when the model first runs"
            remedy = "Run the model once, or load it with dequantize=True, then inject"
            return Reason(problem, remedy)
        if verb == "merge":
            problem = "its layer is quantized by compressed-tensors, whose checkpoints hold no sum"
            remedy = "Load the base in 16 bits, CompressedTensorsConfig(dequantize=True), merge "
            return Reason(problem, f"{remedy}there")
        if verb == "train" and any(getattr(scheme, key, None) is not None for key in _ACTIVATIONS):
            problem = f"{type(module).__name__} quantizes activations as it runs"
            return Reason(problem, "Load the base with CompressedTensorsConfig(dequantize=True)")
        return super().why_not(verb, module, weight)


class CompressedTensors(Library):
    """Plain layers with a scheme: a forward on each instance, which calls that of the class.

    It unpacks their weights when the model first runs. Parameters may be in a cache that stands
    for their dict.
    """

    modules = ("compressed_tensors.quantization",)
    packed = (CompressedWeights(),)

    def calls_class(self, module: nn.Module) -> bool:
        """Return whether the forward is one of compressed-tensors' that does."""
        function = getattr(module.__dict__["forward"], "__func__", None)
        while function is not None:
            owner = getattr(function, "__globals__", {}).get("__name__", "")
            ours = owner.startswith("compressed_tensors.")
            if ours and "__class__" in function.__code__.co_names:
                return True
            function = getattr(function, "__wrapped__", None)
        return False

    def offloads(self, module: nn.Module) -> bool:
        """Return whether its cache (`compressed_tensors.offload.OffloadCache`) has two devices."""
        held = module._parameters
        places = (getattr(held, name, "") for name in ("onload_device", "offload_device"))
        there, kept = (str(place).partition(":")[0] for place in places)
        return there != kept

    def moves(self, module: nn.Module, param: str, held: Tensor) -> bool:
        """Return whether its forward reads W, which it rounds in its place while the layer runs."""
        if not hasattr(module, "quantization_scheme"):
            return False
        return module_calling(READER).startswith(_PACKAGES)


# ---------------------------------------------------------------------- gptqmodel: GPTQ and AWQ


class Kernel(WeightKind):
    """Whatever class of gptqmodel's family transformers loads: no nn.Linear, codes in buffers.

    Each kernel packs in its own way, which nothing here unpacks, and states whether it trains.
    """

    trains = True

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the layer is a kernel of the family with its codes in a buffer."""
        return "qweight" in module._buffers and self.weight_of(type(module)) is not None

    def weight_of(self, cls: type[nn.Module]) -> str | None:
        """Return `qweight`."""
        ours = derives_from(cls, "gptqmodel.nn_modules.qlinear", "BaseQuantLinear")
        return "qweight" if ours else None

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why a kernel does not train, or has no values."""
        name = plain_class(type(module)).__name__
        if verb == "train" and not _trains(plain_class(type(module))):
            remedy = 'Load the base with a kernel that trains (backend="auto_trainable")'
            return Reason(f"{name} is a kernel for inference", remedy)
        if verb in OF_VALUES:
            return Reason(f"a {name} of gptqmodel is not unpacked in memory")
        return super().why_not(verb, module, weight)


def _trains(kernel: Any) -> bool:
    """Whether a layer hands a gradient to its input, as gptqmodel states it of its kernels."""
    flags = ("SUPPORTS_TRAINING", "SUPPORTS_TRAINING_USE_TORCH_KERNEL")
    return any(getattr(kernel, flag, False) for flag in flags)


# --------------------------------------------------------- linear layers of transformers' own

_FP8 = "transformers.integrations.finegrained_fp8"


class Multiplies(WeightKind):
    """Layers of which only the forward is known."""

    forwards = (
        ("transformers.integrations.fbgemm_fp8", "FbgemmFp8Linear"),
        ("transformers.integrations.metal_quantization", "MetalLinear"),
        ("transformers.models.falcon.modeling_falcon", "FalconLinear"),
    )


class FineGrained(LayerKind):
    """`FP8Linear`: float8 with a scale for each block, or one for all."""

    forwards = ((_FP8, "FP8Linear"),)
    trains = True

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the layer is one, and its weight in 8 bits."""
        if weight is None or weight.dtype.itemsize != 1:
            return False
        return derives_from(plain_class(type(module)), _FP8, "FP8Linear")

    def dense(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Return codes times scales."""
        layer: Any = module
        high, wide = layer.block_size or weight.shape
        scales = layer.weight_scale_inv.view(-(-weight.shape[0] // high), -1)
        return float8_values(weight, scales, (high, wide))

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why the values are not known: integers are codes of 4 bits, two to a byte.

        Their backward is not implemented, and that of others is from transformers 5.24 on.
        """
        codes = weight is not None and not weight.is_floating_point()
        if verb == "train":
            known = not codes and _has_backward(module, "FP8Linear", "FP8GroupedLinear")
            return None if known else self.no_gradient(module)
        if verb in OF_VALUES and codes:
            return Reason("it holds 4 bits for each weight, which are not unpacked in memory")
        return super().why_not(verb, module, weight)


def _has_backward(module: nn.Module, *classes: str) -> bool:
    """Whether a module in float8 computes by the Functions of transformers with a backward."""
    where, name = defines_forward(plain_class(type(module)))
    return where == _FP8 and name in classes and hasattr(sys.modules[_FP8], "FP8LinearFunction")


class FineGrainedExperts(WeightKind):
    """`FP8Experts`: stacks in float8 or in 4 bits, which kernels read with scales beside them."""

    trains = True

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the module is one of them."""
        return derives_from(type(module), _FP8, "FP8Experts")

    against: ClassVar[Mapping[Verb, Reason]] = {
        "inject": Reason(
            "experts compute by kernels on codes in 8 or 4 bits",
            "Load the base with FineGrainedFP8Config(dequantize=True), or exclude the experts",
        )
    }

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why no adapter beside them can train: not each way to compute has a backward."""
        if verb != "train":
            return super().why_not(verb, module, weight)
        how = getattr(getattr(module, "config", None), "_experts_implementation", None)
        codes = not all(p.is_floating_point() for p in module.parameters(recurse=False))
        if codes or not _has_backward(module, "FP8Experts"):
            return self.no_gradient(module)
        if how not in ("eager", "grouped_mm"):
            remedy = 'Call model.set_experts_implementation("grouped_mm")'
            return Reason(f"experts in float8 compute by {how}, which has no backward", remedy)
        return None


class KernelExperts(WeightKind):
    """`Mxfp4GptOssExperts`, whose matmul_ogs launches kernels into a new tensor."""

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the module is one of them."""
        return derives_from(type(module), "transformers.integrations.mxfp4", "Mxfp4GptOssExperts")

    against: ClassVar[Mapping[Verb, Reason]] = dict.fromkeys(
        ("inject", "train"),
        Reason(
            "experts compute in MXFP4 by kernels for inference",
            "Load the base with Mxfp4Config(dequantize=True)",
        ),
    )


# What it leaves on the model and on its config.
_ON_MODEL = ("hf_quantizer", "is_quantized", "quantization_method")
_ON_CONFIG = ("quantization_config", "_pre_quantization_dtype", "_is_quantized")


class Quantized(WeightKind):
    """Matches no weight: it knows models."""

    def claims(self, module: nn.Module) -> Iterator[tuple[object, tuple[str, ...]]]:
        """Yield a model with a quantizer, and its config."""
        if "hf_quantizer" in module.__dict__:
            yield module, _ON_MODEL
            if (config := getattr(module, "config", None)) is not None:
                yield config, _ON_CONFIG
