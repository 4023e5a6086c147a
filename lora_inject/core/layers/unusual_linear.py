"""Linear layers that cannot be added to, and those that compute without autograd."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from lora_inject.core.functional.linear import frozen_output
from lora_inject.core.layers.packed_weights import reason_against
from lora_inject.core.layers.reading import formed_weight
from lora_inject.errors import LayerError


def with_whole_weight(layer: Any, x: Tensor) -> Tensor:
    """Multiply a sparse x, or slices of a DTensor, with W + delta, in which a gain is as well."""
    return frozen_output(x, formed_weight(layer), layer._lora_own("bias"), layer.transposed)


def refuse_dead(layer: Any) -> NoReturn:
    """Refuse to train what lies before a layer that computes without autograd."""
    weight = layer._parameters.get(layer.weight_of(type(layer)))
    reason = reason_against("train", layer, weight)
    remedy = "Run it within torch.no_grad(), or call train_only(model, None)"
    raise LayerError(
        f"a forward of a {type(layer).__name__} with gradients",
        f"with its {type(weight).__name__} it hands no gradient to its input",
        remedy if reason is None else f"{reason.remedy}. {remedy}",
    )
