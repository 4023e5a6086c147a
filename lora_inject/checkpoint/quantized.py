"""Recognize quantized weights of a checkpoint, and refuse them with a remedy.

A quantized weight gives itself away by its neighbors (`qweight`, `weight.absmax`,
`weight_scale_inv`, `_blocks`) or by its dtype, so the answer is about the tensors that the adapter
needs, and an adapter on the layers that were left in 16 bits merges as usual.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lora_inject.checkpoint.index import Checkpoint

QUANT_STATE = "quant_state.bitsandbytes__"
FOUR_BIT = ("nf4", "fp4")
_MARKS = {
    **{f"weight.{QUANT_STATE}{k}": f"bitsandbytes 4-bit ({k.upper()})" for k in FOUR_BIT},
    "weight.absmax": "bitsandbytes 4-bit",
    "weight.SCB": "bitsandbytes 8-bit",
    "SCB": "bitsandbytes 8-bit",
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "fp8 with block scales",
    "weight_scale": "fp8 or int8 with scales",
}
_INTEGER = {"U8", "I8", "I32", "U32", "F4"}
FLOAT8 = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
_KNOWN = ("bitsandbytes", "fp8 with block", "MXFP4")  # see `dequantized`


class Quantized(NamedTuple):
    """Why a weight takes no update: the fact, and what to do."""

    found: str
    remedy: str


def method_of(checkpoint: Checkpoint, name: str) -> str | None:
    """Return how one weight is quantized, None where it is a plain float tensor or absent."""
    tensors, module = checkpoint.tensors, name.removesuffix(".weight")
    for mark, method in _MARKS.items():
        if f"{module}.{mark}" in tensors:
            return method
    if f"{name}_blocks" in tensors and f"{name}_scales" in tensors:
        return "MXFP4"
    entry = tensors.get(name)
    if entry is not None and entry.dtype in FLOAT8:
        return "fp8"
    if entry is not None and entry.dtype in _INTEGER:
        return f"packed integers ({entry.dtype})"
    return None


def why_not(checkpoint: Checkpoint, names: Iterable[str]) -> Quantized | None:
    """Return why some weights take no update, None where none of them is quantized."""
    for name in names:
        if method := method_of(checkpoint, name):
            remedy = (
                "Merge into the 16-bit checkpoint that it was made from, then quantize the result"
            )
            if method.startswith(_KNOWN):
                remedy += ", or write the merged one in 16 bits (--dequantize bfloat16)"
            return Quantized(f"'{name}' is quantized: {method}", remedy)
    return None


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the quantization that a config states, empty if it states none."""
    said = config.get("quantization_config")
    return said if isinstance(said, dict) else {}
