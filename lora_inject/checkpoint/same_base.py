"""Telling whether an adapter was made on the base at hand, by the base's values that it holds.

The adapter's fingerprint holds sixteen values of every adapted weight; the same places are read
from the checkpoint and compared as loading onto a model does it (`adapter.fingerprint`). PEFT
stores a whole embedding with an adapter on it, which must equal the base; where the vocabulary
grew, the copy is the only place that has the new rows, and is used as the base.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lora_inject.adapter.fingerprint import Fingerprint, compare, sample_positions
from lora_inject.adapter.mixing import same_values
from lora_inject.checkpoint.choose import Fit
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.output_files import FLOATS
from lora_inject.checkpoint.read import RowReader
from lora_inject.checkpoint.weighted_adapter import WeightedAdapter
from lora_inject.errors import CheckpointError
from lora_inject.storage.disk import open_read, read_at
from lora_inject.storage.safetensors_file import TensorEntry


def check_same_base(checkpoint: Checkpoint, adapter: WeightedAdapter, fit: Fit) -> None:
    """Refuse an adapter whose fingerprint is off by more than a rounding to bfloat16."""
    saved = adapter.state.fingerprint
    if saved is None:
        return
    shapes, samples, packed = {}, {}, {}
    for name, shape in saved.shapes.items():
        entry = checkpoint.tensors.get(fit.rule(name) or name)
        if entry is not None and entry.name in checkpoint.packed:
            if name in saved.quantized and (said := checkpoint.packed[entry.name].packing()):
                shapes[name], packed[name] = tuple(shape), said
            continue
        # Stacked, cut and grown tensors have their places by shape; their values lie elsewhere.
        if entry is not None and entry.shape == tuple(shape) and entry.dtype in FLOATS:
            shapes[name], samples[name] = entry.shape, _sample(checkpoint, entry)
    known = Fingerprint(
        {name: saved.shapes[name] for name in shapes},
        {name: values for name, values in saved.samples.items() if name in shapes},
        saved.quantized,
    )
    if differences := compare(known, Fingerprint(shapes, samples, packed)):
        name, how = next(iter(differences.items()))
        raise CheckpointError(
            f"merge {adapter.label} into '{checkpoint.folder}'",
            f"it was made on another base: {len(differences)} of {len(shapes)} weights differ, "
            f"'{name}' {how}",
            "Use the base that it was trained on, or pass any_base=True to merge all the same",
        )


def fingerprint(checkpoint: Checkpoint, names: Iterable[str]) -> Fingerprint:
    """Take the fingerprint of some float tensors of a checkpoint, as saving a live adapter does."""
    entries = {name: checkpoint.tensors[name] for name in names}
    return Fingerprint(
        {name: entry.shape for name, entry in entries.items()},
        {name: _sample(checkpoint, entry) for name, entry in entries.items()},
    )


def _sample(checkpoint: Checkpoint, entry: TensorEntry) -> tuple[float, ...]:
    dtype, values = FLOATS[entry.dtype], []
    fd = open_read(checkpoint.path_of(entry.name))
    try:
        for position in sample_positions(entry.shape):
            data = bytearray(dtype.itemsize)
            read_at(fd, memoryview(data), entry.start + position * dtype.itemsize)
            values.append(float(torch.frombuffer(data, dtype=dtype).float()))
    finally:
        os.close(fd)
    return tuple(values)


def grown_copies(
    checkpoint: Checkpoint, adapter: WeightedAdapter, fit: Fit
) -> Mapping[str, tuple[TensorEntry, Tensor]]:
    """Return an adapter's copies of base tensors that grew; refuse others that differ from it."""
    grown = {}
    for name, (entry, copy) in fit.copies.items():
        if entry.name in checkpoint.packed:
            continue  # the copy has the values before they were quantized
        if tuple(copy.shape) != entry.shape:
            grown[name] = (entry, copy)
        elif (
            entry.dtype not in FLOATS
            or name in checkpoint.packed
            or not _equal(checkpoint, entry, copy)
        ):
            raise CheckpointError(
                f"merge {adapter.label}",
                f"it carries a copy of '{name}' that differs from the base",
                "Use the base that it was trained on, or list the tensor among its trained ones",
            )
    return grown


def _equal(checkpoint: Checkpoint, entry: TensorEntry, copy: Tensor) -> bool:
    with RowReader(checkpoint.path_of(entry.name)) as reader:
        for start, rows in reader.blocks(entry, entry.shape[1]):
            if not same_values(rows, copy[start : start + rows.shape[0]]):
                return False
    return True
