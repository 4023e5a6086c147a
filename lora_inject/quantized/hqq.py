"""HQQ: layers that are no nn.Linear, with the codes in `W_q` and a `dequantize` of their own."""

from __future__ import annotations

from torch import Tensor, nn

from lora_inject.quantized.own_values import OfLayer


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
