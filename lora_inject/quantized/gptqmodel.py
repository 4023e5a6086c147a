"""gptqmodel: kernels for GPTQ and AWQ, layers that are no nn.Linear and keep codes in buffers.

Each kernel packs in its own way, so the values are measured by what a layer makes of unit vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.layers.adapted import plain_class
from lora_inject.core.layers.weight_kinds import Reason, Verb
from lora_inject.errors import LayerError
from lora_inject.quantized.plain_layers import LayerKind

_FAMILY = ("gptqmodel.nn_modules.qlinear", "BaseQuantLinear")


class Kernel(LayerKind):
    """Whatever class of the family transformers loads for a base in GPTQ or AWQ."""

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the layer is a kernel of the family with its codes in a buffer."""
        return "qweight" in module._buffers and self.weight_of(type(module)) is not None

    def weight_of(self, cls: type[nn.Module]) -> str | None:
        """Return `qweight`."""
        names = ((c.__module__, c.__qualname__) for c in cls.__mro__)
        return "qweight" if _FAMILY in names else None

    def dense(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Return what the layer makes of unit vectors, `(out, in)`.

        That is exact: each output is a sum of one value and zeros.
        """
        layer: Any = module
        scales, buffers = getattr(layer, "scales", None), layer._buffers
        dtype = scales.dtype if isinstance(scales, Tensor) else torch.float16
        bias = buffers.get("bias")
        if bias is not None:
            buffers["bias"] = torch.zeros_like(bias)
        try:
            return _measured(layer, dtype)
        finally:
            if bias is not None:
                buffers["bias"] = bias

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why a kernel does not train, or has no norms."""
        name = plain_class(type(module)).__name__
        if verb == "train" and not _trains(plain_class(type(module))):
            remedy = 'Load the base with a kernel that trains (backend="auto_trainable")'
            return Reason(f"{name} is a kernel for inference", remedy)
        if verb == "norms":
            return Reason(f"each forward would have to measure the values of a {name}")
        return super().why_not(verb, module, weight)


def _measured(layer: Any, dtype: torch.dtype) -> Tensor:
    """Return the values of a layer that now has no bias."""
    plain: Any = plain_class(type(layer))
    columns, n = list[Tensor](), layer.in_features
    for start in range(0, n, 1024):
        size = min(1024, n - start)  # and a row of zeros
        rows = torch.zeros(size + 1, n, dtype=dtype, device=layer.qweight.device)
        rows[:size, start : start + size].fill_diagonal_(1)
        columns.append(plain.forward(layer, rows))
    if any(rows[-1].any() for rows in columns):
        asked, problem = f"dequantizing a {type(layer).__name__}", "it makes no zero of zero"
        raise LayerError(
            asked, problem, "Load the adapter onto the base in 16 bits and merge there"
        )
    return torch.cat([rows[:-1] for rows in columns]).t()


def _trains(kernel: Any) -> bool:
    """Whether a layer hands a gradient to its input, as gptqmodel states it of its kernels."""
    stated = (
        getattr(kernel, f"SUPPORTS_TRAINING{each}", None) for each in ("", "_USE_TORCH_KERNEL")
    )
    return any(stated) or not hasattr(kernel, "SUPPORTS_TRAINING")
