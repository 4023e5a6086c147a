"""Linear layers: `nn.Linear`, its subclasses that are linear in W, and transformers' Conv1D.

Where the layer's own forward is the stock one over a plain tensor, layer and update run
as one fused step; else the layer is called untouched and the update is added to its output. The
second way is what quantised and unknown subclasses get.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.functional import add_updates, linear
from lora_inject.layers.adapted import Geometry
from lora_inject.layers.forward_update import ForwardUpdate


class LoRALinear(ForwardUpdate):
    """Forward update of `nn.Linear`: `x W^T + b + scale * drop(x) A^T B^T` (paper, eq. 3)."""

    kind = "linear"
    transposed = False
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return whether the module is an `nn.Linear`."""
        return isinstance(module, nn.Linear)

    @staticmethod
    def geometry(module: nn.Module) -> Geometry:
        """Return the widths that the layer states; packed 4-bit weights have other shapes."""
        n_in, n_out = int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
        return Geometry(n_in, n_out, (n_out, n_in))

    @staticmethod
    def stock(plain: type[nn.Module]) -> bool:
        """Return whether `forward` is nn.Linear's own."""
        return plain.forward is nn.Linear.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer with the adapters that take part.

        Args:
            *args: For the layer's own forward; the first is x, `(..., in_features)`.
            **kwargs: For the layer's own forward; the first is x where there are no `args`.

        Returns:
            `(..., out_features)`, in the dtype of the plain layer's output.

        Raises:
            LayerError: Under `routed`, the batch is not as long as the rows.
        """
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        attached = self._lora
        state = attached.selection.current()
        if state.routed:
            routing = self._lora_routing(x, state)
            fresh = self._lora_stock and type(self._parameters["weight"]) is nn.Parameter
            y = super().forward(*args, **kwargs)
            return self._lora_routed(y, x, routing, in_place=fresh)
        float32 = attached.float32
        if torch.compiler.is_compiling():
            y = super().forward(*args, **kwargs)
            updates = self._lora_compiled(y, state)
            updates = self._lora_updates(state) if updates is None else updates
            return add_updates(y, x, updates, float32=float32) if updates else y
        updates = self._lora_updates(state)
        if not updates:
            return super().forward(*args, **kwargs)
        held = self._parameters
        if self._lora_stock and type(held["weight"]) is nn.Parameter:
            if self._lora_reads or "bias" not in held:
                weight, bias = self.weight, self.bias
            else:  # without nn.Module's slow look-up
                weight, bias = held["weight"], held["bias"]
            return linear(x, weight, bias, updates, transposed=self.transposed, float32=float32)
        return add_updates(super().forward(*args, **kwargs), x, updates, float32=float32)


class LoRAConv1D(LoRALinear):
    """Forward update of transformers' Conv1D, a linear layer with the weight `(in, out)`.

    Source: `transformers/pytorch_utils.py`. The class is known by where it was defined, so that
    transformers need not be imported.
    """

    kind = "conv1d"
    transposed = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return whether the module's class is, or derives from, transformers' Conv1D."""
        return any(_is_conv1d(c) for c in type(module).__mro__)

    @staticmethod
    def geometry(module: nn.Module) -> Geometry:
        """Return the widths, `nx` in and `nf` out."""
        n_in, n_out = int(module.nx), int(module.nf)  # type: ignore[arg-type]
        return Geometry(n_in, n_out, (n_in, n_out), transposed=True)

    @staticmethod
    def stock(plain: type[nn.Module]) -> bool:
        """Return whether `forward` is Conv1D's own."""
        owner = next(c for c in plain.__mro__ if "forward" in c.__dict__)
        return _is_conv1d(owner)


def _is_conv1d(cls: type) -> bool:
    return cls.__module__ == "transformers.pytorch_utils" and cls.__qualname__ == "Conv1D"
