"""Bases that quantize activations as they run, on which an adapter serves and cannot train."""

from __future__ import annotations

from torch import nn

from lora_inject.errors import LayerError
from lora_inject.layers.survey import Survey

# What torchao's tensors call it: Int8Tensor and Float8Tensor, IntxUnpackedToInt8Tensor.
_SETTINGS = ("act_quant_kwargs", "activation_quantization")


def refuse_dead_inputs(survey: Survey, asked: str) -> None:
    """Refuse to train where a layer hands no gradient to its input.

    torchao's layers that quantize activations compute without autograd: whatever lies before them
    would get a part of its gradient, or none.

    Raises:
        LayerError: The model holds such a weight.
    """
    for name, weight in survey.parameters():
        plain = type(weight) is nn.Parameter
        if not plain and any(getattr(weight, each, None) is not None for each in _SETTINGS):
            raise LayerError(
                f"{asked}, {name!r}",
                f"its {type(weight).__name__} quantizes activations as it runs, through which no "
                "gradient reaches the layers before it",
                "Quantize the weights only (torchao: Int8WeightOnlyConfig); an adapter that was "
                "trained elsewhere can be loaded onto it",
            )
