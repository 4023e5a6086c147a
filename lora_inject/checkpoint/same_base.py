"""Check that an adapter was made on this base, by the base's values that it holds.

The adapter's fingerprint holds sixteen values of every adapted weight. The same places are read
from the checkpoint and compared as when loading onto a model (`adapter.fingerprint`). PEFT stores a
whole embedding with an adapter on it. This copy must equal the base; if the vocabulary grew, only
the copy has the new rows, and it is used as the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from lora_inject.adapter.fingerprint import Fingerprint, compare, sample_positions
from lora_inject.adapter.mixing import same_values
from lora_inject.checkpoint.choose import Fit
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.errors import CheckpointError
from lora_inject.storage.safetensors_file import TensorEntry
from lora_inject.storage.tensor_rows import FLOATS, RowReader


def check_same_base(fit: Fit) -> None:
    """Refuse an adapter whose fingerprint is off by more than a rounding to bfloat16."""
    checkpoint, saved = fit.checkpoint, fit.adapter.state.fingerprint
    if saved is None:
        return
    shapes, samples, packed = {}, {}, {}
    for name, shape in saved.shapes.items():
        entry = checkpoint.tensors.get(fit.rule(name) or name)
        if entry is None:
            continue
        if entry.name in checkpoint.packed:
            if name in saved.quantized and (said := checkpoint.packed[entry.name].packing()):
                shapes[name], packed[name] = tuple(shape), said
        # Places depend on the shape, so in stacked, cut and grown tensors they hold other values.
        elif entry.shape == tuple(shape) and entry.dtype in FLOATS:
            shapes[name], samples[name] = entry.shape, _sample(checkpoint, entry)
    known = Fingerprint(
        {name: saved.shapes[name] for name in shapes},
        {name: values for name, values in saved.samples.items() if name in shapes},
        saved.quantized,
    )
    if differences := compare(known, Fingerprint(shapes, samples, packed)):
        name, how = next(iter(differences.items()))
        raise CheckpointError(
            f"merge {fit.adapter.label} into '{checkpoint.folder}'",
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
    reader = RowReader(checkpoint.path_of(entry.name))
    values = (reader.rows(entry, 1, at, at + 1) for at in sample_positions(entry.shape))
    return tuple(float(value.float()) for value in values)


def grown_copies(fit: Fit) -> Iterator[tuple[str, TensorEntry, Tensor]]:
    """Yield an adapter's copies of base tensors that grew; refuse others that differ from it."""
    for name, (entry, copy) in fit.copies.items():
        if entry.name in fit.checkpoint.packed:
            continue  # the copy has the values before they were quantized
        if tuple(copy.shape) != entry.shape:
            yield name, entry, copy
        elif entry.dtype not in FLOATS or not _equal(fit.checkpoint, entry, copy):
            raise CheckpointError(
                f"merge {fit.adapter.label}",
                f"it carries a copy of '{name}' that differs from the base",
                "Use the base that it was trained on, or list the tensor among its trained ones",
            )


def _equal(checkpoint: Checkpoint, entry: TensorEntry, copy: Tensor) -> bool:
    blocks = RowReader(checkpoint.path_of(entry.name)).blocks(entry, entry.shape[1])
    return all(same_values(rows, copy[start : start + len(rows)]) for start, rows in blocks)
