"""Linear layers: `nn.Linear`, quantized subclasses of it, and packed layers that are none.

If the layer's forward is the stock one on a plain tensor, layer and update run as one fused step.
Otherwise the layer runs unchanged and the update is added to its output; quantized layers, and
kinds from outside that add to their output, use this second way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_inject.core.functional.factors import Update
from lora_inject.core.functional.linear import frozen_output, linear
from lora_inject.core.functional.plain_operations import add_updates
from lora_inject.core.layers.adapted import defines_forward, keeps_forward, plain_class
from lora_inject.core.layers.forward_update import ForwardUpdate
from lora_inject.core.layers.gains import linear_with_gain
from lora_inject.core.layers.own_code import OWN
from lora_inject.core.layers.packed_weights import multiplies, packed_weight
from lora_inject.core.layers.plain_tensors import PLAIN
from lora_inject.core.layers.unusual_linear import refuse_dead, with_whole_weight
from lora_inject.core.spec.sites import Geometry


class LoRALinear(ForwardUpdate):
    """Forward update of `nn.Linear`: `x W^T + b + scale * drop(x) A^T B^T` (paper, eq. 3)."""

    kind = "linear"
    transposed = False  # whether the weight is stored (in, out)

    @classmethod
    def matches(cls, layer: type[nn.Module]) -> bool:
        """Return whether a class is an `nn.Linear`, or a packed layer that stands for one."""
        return issubclass(layer, nn.Linear) or packed_weight(layer) is not None

    @classmethod
    def weight_of(cls, layer: type[nn.Module]) -> str:
        """Return the name of the weight, or of what is packed in its place."""
        return packed_weight(layer) or cls.weight_name

    @staticmethod
    def geometry(module: Any) -> Geometry:
        """Return the widths that the layer states; packed 4-bit weights have other shapes."""
        n_in, n_out = int(module.in_features), int(module.out_features)
        return Geometry(n_in, n_out, (n_out, n_in))

    @staticmethod
    def stock(plain: type[nn.Module]) -> bool:
        """Return whether `forward` is nn.Linear's own, and the weight a parameter."""
        is_torchs = plain.forward is nn.Linear.forward and keeps_forward(plain)
        return is_torchs and not hasattr(plain, "weight")

    @classmethod
    def adds_to_output(cls, module: nn.Module, *, stock: bool) -> bool:
        """Return whether the layer is stock, or known to multiply by its weight.

        The projection of torch's attention is never called: the attention reads its weight.
        """
        is_called = not isinstance(module, NonDynamicallyQuantizableLinear)
        return is_called and (stock or multiplies(plain_class(type(module))))

    def _lora_with_updates(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], updates: Sequence[Update]
    ) -> Any:
        """Compute the layer with a sum of updates.

        1. Where the layer is stock and its weight plain, both are one fused step.
        2. Where the sum cannot be added to the output (a sparse x; slices of a DTensor), the layer
           multiplies with W + delta.
        3. Else the layer runs unchanged, and the sum is added to its output.
        """
        x = args[0] if len(args) == 1 and not kwargs else self._lora_input(args, kwargs)
        float32 = self._lora.float32
        if self._lora_stock and not x.is_nested:
            weight, bias = self._lora_weight_and_bias()
            if type(weight) in PLAIN and x.layout is torch.strided:
                transposed = self.transposed
                return linear(x, weight, bias, updates, transposed=transposed, float32=float32)
            sliced = any(update.spans for update in updates)
            # A DTensor can be added to as a whole, and to no part of it.
            if x.layout is not torch.strided or (sliced and hasattr(weight, "full_tensor")):
                return with_whole_weight(self, x)
        y = self._lora_without_updates(args, kwargs)
        return add_updates(y, x, updates, float32=float32)

    def _lora_with_gain(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        updates: Sequence[Update],
        gain: Tensor,
    ) -> Any:
        """Compute the layer with a sum of updates, and multiply by a gain."""
        return linear_with_gain(self, args, kwargs, updates, gain)

    def _lora_without_updates(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the layer without its forward updates."""
        x = self._lora_input(args, kwargs)
        if self._lora_stock:  # the plain forward would read the effective weight
            weight, bias = self._lora_weight_and_bias()
            y = frozen_output(x, weight, bias, self.transposed)
        else:
            before, OWN.adds = OWN.adds, self._lora
            try:
                y = self._lora_plain.forward(self, *args, **kwargs)
            finally:
                OWN.adds = before
        if x.requires_grad and not y.requires_grad and torch.is_grad_enabled():
            refuse_dead(self)
        return y

    def _lora_weight_and_bias(self) -> tuple[Any, Any]:
        held = self._parameters
        if self._lora.reads or "weight" not in held or "bias" not in held:
            return self._lora_own("weight"), self._lora_own("bias")
        return held["weight"], held["bias"]


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
