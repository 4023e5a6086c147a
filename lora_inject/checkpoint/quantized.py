"""Recognizing quantized weights, which take no update, and saying what to do instead.

A quantized weight gives itself away by its neighbors (`qweight`, `weight.absmax`,
`weight_scale_inv`, `_blocks`) or by its dtype, so the answer is about the tensors that the adapter
needs, and an adapter on the layers that were left in 16 bits merges as usual.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lora_inject.checkpoint.index import Checkpoint

_MARKS = (
    ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes 4-bit (NF4)"),
    ("weight.quant_state.bitsandbytes__fp4", "bitsandbytes 4-bit (FP4)"),
    ("weight.absmax", "bitsandbytes 4-bit"),
    ("weight.SCB", "bitsandbytes 8-bit"),
    ("SCB", "bitsandbytes 8-bit"),
    ("qweight", "GPTQ or AWQ"),
    ("weight_packed", "compressed-tensors"),
    ("weight_scale_inv", "fp8 with block scales"),
    ("weight_scale", "fp8 or int8 with scales"),
)
_INTEGER = {"U8", "I8", "I32", "U32", "F4"}
_FLOAT8 = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}


@dataclass(frozen=True)
class Quantized:
    """Why a weight takes no update.

    Attributes:
        method: How it is quantized.
        found: The fact, for a message.
        remedy: What to do.
    """

    method: str
    found: str
    remedy: str


def quantization_of(checkpoint: Checkpoint, name: str) -> str | None:
    """Return how one weight is quantized, None where it is a plain float tensor or absent."""
    tensors = checkpoint.tensors
    module = name.removesuffix(".weight")
    for mark, method in _MARKS:
        if f"{module}.{mark}" in tensors:
            return method
    if f"{name}_blocks" in tensors and f"{name}_scales" in tensors:
        return "MXFP4"
    entry = tensors.get(name)
    if entry is None:
        return None
    if entry.dtype in _FLOAT8:
        return "fp8"
    return f"packed integers ({entry.dtype})" if entry.dtype in _INTEGER else None


def why_not(checkpoint: Checkpoint, names: Iterable[str]) -> Quantized | None:
    """Return why some weights take no update, None where none of them is quantized.

    Args:
        checkpoint: The base.
        names: Names of the weights as the checkpoint or the adapter has them.
    """
    for name in names:
        method = quantization_of(checkpoint, name)
        if method is None:
            continue
        remedy = "Merge into the 16-bit checkpoint that it was made from, then quantize the result"
        if method.startswith("fp8 with block"):
            remedy += ", or write it as bfloat16 (--dequantize)"
        return Quantized(method, f"'{name}' is quantized: {method}", remedy)
    return None
