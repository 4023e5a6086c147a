"""optimum-quanto: layers of its own classes, whose tensors say their values."""

from __future__ import annotations

from torch import Tensor, nn

from lora_inject.core.layers.adapted import defines_forward
from lora_inject.quantized.own_values import OfTensor


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
