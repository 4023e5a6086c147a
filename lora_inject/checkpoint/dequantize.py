"""Float8 weights with block scales, read as what they stand for.

The value of an element is its float8 value times the scale of its block
(`weight_scale_inv`, float32, one for every 128 x 128 elements unless the config says otherwise), so
rows can be dequantized as they are read. The scales are small and are read when needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_inject.checkpoint.index import Checkpoint
from lora_inject.errors import CheckpointError
from lora_inject.storage.safetensors_file import TensorEntry

_SUFFIX = "_scale_inv"
_DTYPE = "F8_E4M3"


@dataclass(frozen=True)
class Scales:
    """The scales of one float8 weight.

    Attributes:
        path: The file they are in.
        entry: Their tensor.
        block: Rows and columns that share a scale.
    """

    path: Path
    entry: TensorEntry
    block: tuple[int, int]

    def apply(self, rows: Tensor, start: int, scales: Tensor) -> Tensor:
        """Return float32 values of some rows.

        Args:
            rows: `(n, cols)`, float8.
            start: Index of the first row.
            scales: The whole table, as `read` gives it.
        """
        height, width = self.block
        of_row = torch.arange(start, start + rows.shape[0]) // height
        per_row = scales[of_row].repeat_interleave(width, dim=1)[:, : rows.shape[1]]
        return rows.to(torch.float32) * per_row


def find_scales(checkpoint: Checkpoint) -> dict[str, Scales]:
    """Return the scales of every float8 weight of a checkpoint, by the weight's name.

    Raises:
        CheckpointError: A float8 weight has none, or they have another shape than the weight asks.
    """
    block = _block(checkpoint.config)
    found = {}
    for entry in checkpoint:
        if not entry.dtype.startswith("F8_") or entry.name.endswith(_SUFFIX):
            continue
        scales = checkpoint.tensors.get(entry.name + _SUFFIX)
        if entry.dtype != _DTYPE or scales is None or len(entry.shape) != 2:
            raise _refused(entry, "it is float8 without block scales")
        wanted = tuple(-(-size // b) for size, b in zip(entry.shape, block, strict=True))
        if scales.shape != wanted or scales.dtype not in {"F32", "BF16", "F16"}:
            raise _refused(entry, f"its scales are {scales.dtype} {list(scales.shape)}")
        shard = checkpoint.shards[checkpoint.shard_of[scales.name]]
        found[entry.name] = Scales(shard.path, scales, block)
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
