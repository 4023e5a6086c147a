"""Tensors of the base that an adapter's file carries beside the adapter.

PEFT stores a whole embedding next to an adapter on it. The copy must equal the base, or
the adapter was made on another one; where the vocabulary grew, the copy is the only place that has
the new rows, and is used as the base.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_inject.checkpoint.choose import Fit
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.output_files import FLOATS
from lora_inject.checkpoint.read import RowReader
from lora_inject.checkpoint.weighted_adapter import WeightedAdapter
from lora_inject.errors import CheckpointError
from lora_inject.storage.safetensors_file import TensorEntry


def check_copies(
    checkpoint: Checkpoint, adapter: WeightedAdapter, fit: Fit
) -> Mapping[str, tuple[TensorEntry, Tensor]]:
    """Compare an adapter's copies with the base and return those that grew.

    Args:
        checkpoint: The base.
        adapter: The adapter.
        fit: Where its tensors belong.

    Returns:
        Tensor name to the base's tensor and the grown copy.

    Raises:
        CheckpointError: A copy of the base's own size has other values.
    """
    grown = {}
    for name, (entry, copy) in fit.copies.items():
        if tuple(copy.shape) != entry.shape:
            grown[name] = (entry, copy)
        elif entry.dtype not in FLOATS or not _equal(checkpoint, entry, copy):
            raise CheckpointError(
                f"merge {adapter.label}",
                f"it carries a copy of '{name}' that differs from the base",
                "Use the base that it was trained on, or list the tensor among its trained ones",
            )
    return grown


def _equal(checkpoint: Checkpoint, entry: TensorEntry, copy: Tensor) -> bool:
    """Compare in whichever of the two dtypes is the narrower."""
    shard = checkpoint.shards[checkpoint.shard_of[entry.name]]
    with RowReader(shard.path) as reader:
        for start, rows in reader.blocks(entry, entry.shape[1]):
            mine = copy[start : start + rows.shape[0]]
            narrow = min(rows.dtype, mine.dtype, key=lambda dtype: dtype.itemsize)
            if not torch.equal(rows.to(narrow), mine.to(narrow)):
                return False
    return True
