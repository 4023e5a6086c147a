"""What transformers says of a model that it has quantized, whatever the library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lora_inject.core.layers.weight_kinds import WeightKind

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
