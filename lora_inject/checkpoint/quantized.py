"""Quantized weights: recognized and refused with a way out, or float8 read as what it stands for.

A quantized weight gives itself away by its neighbors (`qweight`, `weight.absmax`,
`weight_scale_inv`, `_blocks`) or by its dtype, so the answer is about the tensors that the adapter
needs, and an adapter on the layers that were left in 16 bits merges as usual.

The value of a float8 element is its own value times the scale of its block (`weight_scale_inv`, one
for every 128 x 128 elements unless the config says otherwise), so rows can be dequantized as they
are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_inject.checkpoint.index import Checkpoint
from lora_inject.errors import CheckpointError
from lora_inject.storage.safetensors_file import TensorEntry

_MARKS = {
    "weight.quant_state.bitsandbytes__nf4": "bitsandbytes 4-bit (NF4)",
    "weight.quant_state.bitsandbytes__fp4": "bitsandbytes 4-bit (FP4)",
    "weight.absmax": "bitsandbytes 4-bit",
    "weight.SCB": "bitsandbytes 8-bit",
    "SCB": "bitsandbytes 8-bit",
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "fp8 with block scales",
    "weight_scale": "fp8 or int8 with scales",
}
_INTEGER = {"U8", "I8", "I32", "U32", "F4"}
_FLOAT8 = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
_SCALES = "_scale_inv"


class Quantized(NamedTuple):
    """Why a weight takes no update: the fact, and what to do."""

    found: str
    remedy: str


def _method(checkpoint: Checkpoint, name: str) -> str | None:
    """Return how one weight is quantized, None where it is a plain float tensor or absent."""
    tensors, module = checkpoint.tensors, name.removesuffix(".weight")
    for mark, method in _MARKS.items():
        if f"{module}.{mark}" in tensors:
            return method
    if f"{name}_blocks" in tensors and f"{name}_scales" in tensors:
        return "MXFP4"
    entry = tensors.get(name)
    if entry is not None and entry.dtype in _FLOAT8:
        return "fp8"
    if entry is not None and entry.dtype in _INTEGER:
        return f"packed integers ({entry.dtype})"
    return None


def why_not(checkpoint: Checkpoint, names: Iterable[str]) -> Quantized | None:
    """Return why some weights take no update, None where none of them is quantized."""
    for name in names:
        if method := _method(checkpoint, name):
            remedy = (
                "Merge into the 16-bit checkpoint that it was made from, then quantize the result"
            )
            if method.startswith("fp8 with block"):
                remedy += ", or write it as bfloat16 (--dequantize)"
            return Quantized(f"'{name}' is quantized: {method}", remedy)
    return None


@dataclass(frozen=True)
class Scales:
    """The scales of one float8 weight: their tensor, its file, rows and columns that share one."""

    path: Path
    entry: TensorEntry
    block: tuple[int, int]

    def apply(self, rows: Tensor, start: int, scales: Tensor) -> Tensor:
        """Return float32 values of rows `(n, cols)` from `start`, given the whole table."""
        height, width = self.block
        of_row = torch.arange(start, start + rows.shape[0]) // height
        per_row = scales[of_row].repeat_interleave(width, dim=1)[:, : rows.shape[1]]
        return rows.to(torch.float32) * per_row


def find_scales(checkpoint: Checkpoint) -> dict[str, Scales]:
    """Return the scales of every float8 weight of a checkpoint, by the weight's name."""
    block, found = _block(checkpoint.config), {}
    for entry in checkpoint:
        if not entry.dtype.startswith("F8_") or entry.name.endswith(_SCALES):
            continue
        scales = checkpoint.tensors.get(entry.name + _SCALES)
        if entry.dtype != "F8_E4M3" or scales is None or len(entry.shape) != 2:
            raise _refused(entry, "it is float8 without block scales")
        wanted = tuple(-(-size // b) for size, b in zip(entry.shape, block, strict=True))
        if scales.shape != wanted or scales.dtype not in {"F32", "BF16", "F16"}:
            raise _refused(entry, f"its scales are {scales.dtype} {list(scales.shape)}")
        found[entry.name] = Scales(checkpoint.path_of(scales.name), scales, block)
    return found


def _block(config: Mapping[str, Any]) -> tuple[int, int]:
    quantized = config.get("quantization_config")
    said = quantized.get("weight_block_size") if isinstance(quantized, dict) else None
    if said is None:
        return 128, 128
    if isinstance(said, list) and len(said) == 2 and all(type(b) is int and b > 0 for b in said):
        return said[0], said[1]
    raise CheckpointError(
        "dequantize", f"config.json has the block size {str(said)[:40]}", "Give it two numbers"
    )


def _refused(entry: TensorEntry, found: str) -> CheckpointError:
    return CheckpointError(
        f"dequantize '{entry.name}'", found, "Only float8 (e4m3) with block scales is understood"
    )
