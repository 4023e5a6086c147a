"""Linear layers with the weight `(in, out)`, as GPT-2's Conv1D has it."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_inject.core.layers.adapted import defines_forward, keeps_forward
from lora_inject.core.layers.linear_kinds import LoRALinear
from lora_inject.core.spec.sites import Geometry

# The module and the name of the class.
_CONV1D = {("transformers.pytorch_utils", "Conv1D")}


class LoRAConv1D(LoRALinear):
    """Forward update of a linear layer with the transposed weight."""

    kind = "conv1d"
    transposed = True

    @classmethod
    def matches(cls, layer: type[nn.Module]) -> bool:
        """Return whether a class is, or derives from, transformers' Conv1D."""
        return any((c.__module__, c.__qualname__) in _CONV1D for c in layer.__mro__)

    @staticmethod
    def geometry(module: Any) -> Geometry:
        """Return the widths, `nx` in and `nf` out."""
        n_in, n_out = int(module.nx), int(module.nf)
        return Geometry(n_in, n_out, (n_in, n_out), transposed=True)

    @staticmethod
    def stock(plain: type[nn.Module]) -> bool:
        """Return whether `forward` is Conv1D's own, and the weight a parameter."""
        is_known = defines_forward(plain) in _CONV1D and keeps_forward(plain)
        return is_known and not hasattr(plain, "weight")
