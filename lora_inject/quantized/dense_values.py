"""The values that the quantized weight of a layer stands for."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.checks.fingerprint import codes_of
from lora_inject.core.layers.adapted import plain_class
from lora_inject.errors import LayerError

_BITSANDBYTES = "bitsandbytes.nn.modules"
_FP8 = ("transformers.integrations.finegrained_fp8", "FP8Linear")
# Layers that are not nn.Linear and multiply likewise, with the tensor of theirs that is the weight:
# whatever class of these families transformers loads for a base in HQQ, GPTQ or AWQ.
PACKED = {
    ("hqq.core.quantize", "HQQLinear"): "W_q",
    ("gptqmodel.nn_modules.qlinear", "BaseQuantLinear"): "qweight",
}


def packed_weight(cls: type) -> str | None:
    """Return the name of the packed weight of a layer that is not an nn.Linear."""
    if issubclass(cls, nn.Linear):
        return None
    families = ((c.__module__, c.__qualname__) for c in cls.__mro__)
    return next((PACKED[family] for family in families if family in PACKED), None)


def why_not_dense(module: nn.Module, weight: Tensor, *, again: bool) -> str | None:
    """Return why a quantized weight cannot be dequantized, or `again` quantized; None if it can."""
    kind, plain = kind_of_weight(module, weight), plain_class(type(module))
    if kind is None or (kind in ("4-bit", "int8") and plain.__module__ != _BITSANDBYTES):
        return f"dequantizing a {plain.__name__} of {plain.__module__} is not supported"
    if kind == "int8" and (weight.dtype != torch.int8 or _row_scales(module, weight) is None):
        return "bitsandbytes has not quantized it yet"
    if kind == "float8" and not hasattr(import_module(_FP8[0]), "_dequantize_fp8_weight"):
        return "transformers before 5.24 has no function for it"
    if again and kind not in ("4-bit", "int8"):
        return "only bitsandbytes' formats can be quantized again"
    return None


def why_no_norms(module: nn.Module, weight: Tensor) -> str | None:
    """Return why no forward can take the norms of a quantized weight; None if it can."""
    if kind_of_weight(module, weight) == "measured":
        return f"each forward would have to measure the values of a {type(module).__name__}"
    return why_not_dense(module, weight, again=False)


def kind_of_weight(module: nn.Module, weight: Tensor) -> str | None:
    """Return how the values of a quantized weight are found, None if that is not known."""
    plain, cls = plain_class(type(module)), type(weight)
    if packed_weight(plain) in module._buffers:  # GPTQ and AWQ: each kernel packs in its own way
        return "measured"
    if (plain.__module__, plain.__qualname__) == _FP8 and weight.element_size() == 1:
        return "float8"
    if cls.__module__ == _BITSANDBYTES:
        return "4-bit" if getattr(weight, "quant_state", None) is not None else "int8"
    if cls.dequantize is not Tensor.dequantize:  # torchao, quanto
        return "tensor"
    return "layer" if callable(getattr(plain, "dequantize", None)) else None  # HQQ


def _row_scales(module: nn.Module, weight: Any) -> Tensor | None:
    """Return bitsandbytes' scales of int8 rows, which the first forward moves to the layer."""
    found: Tensor | None = getattr(weight, "SCB", None)
    return found if found is not None else getattr(getattr(module, "state", None), "SCB", None)


@torch.no_grad()
def dense(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the values that a quantized weight stands for in its layer, as new float32."""
    held: Any = weight
    layer: Any = module
    kind = kind_of_weight(module, weight)
    if kind == "measured":
        values = _measured(layer)
    elif kind in ("tensor", "layer"):
        values = held.dequantize() if kind == "tensor" else layer.dequantize()
    elif kind == "4-bit":
        from bitsandbytes.functional import dequantize_4bit

        state = copy.copy(held.quant_state)
        if getattr(state, "packing_format_for_cpu", False):  # rearranged by inference, scales too
            state.absmax, state.nested = state.absmax.t().reshape(-1).float(), False
        values = dequantize_4bit(codes_of(held.data, held.quant_state), state)
    elif kind == "float8":
        from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

        scales, block = layer.weight_scale_inv, layer.block_size
        values = _dequantize_fp8_weight(held, scales, block, torch.float32)
    else:
        rows: Any = _row_scales(module, weight)
        values = held.data.float() * (rows.float() / 127)[:, None]
    found: Tensor = values.to(torch.float32).contiguous()
    return found


def _measured(layer: Any) -> Tensor:
    """Return the values of a packed layer `(out, in)`, by what it makes of unit vectors.

    That is exact: each output is a sum of one value and zeros.
    """
    scales, buffers = getattr(layer, "scales", None), layer._buffers
    dtype = scales.dtype if isinstance(scales, Tensor) else torch.float16
    plain: Any = plain_class(type(layer))
    bias, columns, n = buffers.get("bias"), [], layer.in_features
    if bias is not None:
        buffers["bias"] = torch.zeros_like(bias)
    try:
        for start in range(0, n, 1024):
            size = min(1024, n - start)  # and a row of zeros
            rows = torch.zeros(size + 1, n, dtype=dtype, device=buffers["qweight"].device)
            rows[:size, start : start + size].fill_diagonal_(1)
            columns.append(plain.forward(layer, rows))
    finally:
        if bias is not None:
            buffers["bias"] = bias
    if any(rows[-1].any() for rows in columns):
        asked, found = f"dequantizing a {type(layer).__name__}", "it makes no zero of zero"
        raise LayerError(asked, found, "Load the adapter onto the base in 16 bits and merge there")
    return torch.cat([rows[:-1] for rows in columns]).t()
