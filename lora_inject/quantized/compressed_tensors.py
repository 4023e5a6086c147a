"""compressed-tensors: plain layers with a scheme.

It unpacks their weights when the model first runs, and puts a forward onto each instance, which
calls that of the class.
"""

from __future__ import annotations

from torch import Tensor, nn

from lora_inject.core.functional.torch_stack import module_calling
from lora_inject.core.layers.adapted import defines_forward
from lora_inject.core.layers.library import Library
from lora_inject.core.layers.swapped_class import READER
from lora_inject.core.layers.weight_kinds import Reason, Verb, WeightKind

_LAYER = ("transformers.integrations.compressed_tensors", "CompressedTensorsFP8Linear")
_PACKAGES = ("compressed_tensors.", "transformers.integrations.compressed_tensors")
_ACTIVATIONS = ("input_activations", "output_activations")


class CompressedWeights(WeightKind):
    """Every weight of a layer with a `quantization_scheme`."""

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the layer has a scheme."""
        return hasattr(module, "quantization_scheme")

    def multiplies(self, cls: type[nn.Module]) -> bool:
        """Return whether the forward is that of transformers' layer for its float8 weights."""
        return defines_forward(cls) == _LAYER

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
    """A forward on each instance, and Parameters in a cache that stands for their dict."""

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
