"""What each output file will hold, byte for byte, and where each byte comes from.

An output file is a header, some ranges copied from the base, and some tensors that are
computed. Where nothing changes shape or dtype the header is the base's own and every offset stays,
so that all but the merged tensors is copied in long runs by the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_inject.checkpoint.dequantize import Scales
from lora_inject.checkpoint.index import Shard
from lora_inject.checkpoint.place import Placed, matrix_of
from lora_inject.storage.safetensors_file import Header, TensorEntry, build_header

FLOATS: Mapping[str, torch.dtype] = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Dtypes that take an update, by the format's name."""

READABLE: Mapping[str, torch.dtype] = {**FLOATS, "F8_E4M3": torch.float8_e4m3fn}
"""Dtypes whose values can be read."""


@dataclass(frozen=True)
class TensorJob:
    """One output tensor whose bytes are not those of the base.

    Attributes:
        name: Its name in the output.
        source: The base's tensor it is made from; None for one that only the adapter has.
        source_shard: Name of the shard that holds `source`.
        dtype: The format's name of its dtype in the output.
        shape: Its dimensions in the output.
        placed: Low-rank terms, on disjoint ranges of rows or on the same one.
        trained: Full tensors of adapters with their weights: `W + sum of w (T - W)`.
        base_copy: The base's values where the adapter carries them (a grown vocabulary), else None.
        scales: Block scales of a float8 source that is dequantized, else None.
        magnitude: DoRA's magnitude, one value for each output, else None.
        added: Vectors to add, with their weights.
        rows: Rows to replace: `(indices, values)`.
        action: `folded`, `replaced`, `added`, `untied`, `cast` or `dequantized`.
        sites: Names of the adapters' sites and tensors that went into it.
    """

    name: str
    source: TensorEntry | None
    source_shard: str | None
    dtype: str
    shape: tuple[int, ...]
    placed: tuple[Placed, ...] = ()
    trained: tuple[tuple[Tensor, float], ...] = ()
    base_copy: Tensor | None = None
    scales: Scales | None = None
    magnitude: Tensor | None = None
    added: tuple[tuple[Tensor, float], ...] = ()
    rows: tuple[tuple[tuple[int, ...], Tensor], ...] = ()
    action: str = "folded"
    sites: tuple[str, ...] = field(default=())

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of the tensor seen as the matrix that the terms are on."""
        if self.placed:
            n_cols = self.placed[0].n_cols
            n_elements = torch.Size(self.shape).numel()
            return n_elements // n_cols, n_cols
        return matrix_of(self.shape)

    @property
    def transposed(self) -> bool:
        """Whether the outputs are the matrix's columns."""
        return any(term.spec.transposed for place in self.placed for term in place.terms)


@dataclass(frozen=True, slots=True)
class Copy:
    """A range of bytes that stays as it is.

    Attributes:
        source_start: First byte in the base's shard.
        target_start: First byte in the output's.
        n_bytes: How many.
    """

    source_start: int
    target_start: int
    n_bytes: int


@dataclass(frozen=True)
class OutputShard:
    """One file of the output.

    Attributes:
        name: Its plain file name.
        base: The base's shard of the same name, None for a new one.
        header: Its header.
        copies: Ranges to copy from `base`.
        jobs: Tensors to compute.
    """

    name: str
    base: Shard | None
    header: Header
    copies: tuple[Copy, ...]
    jobs: tuple[TensorJob, ...]

    @property
    def data_bytes(self) -> int:
        """Bytes of all its tensors."""
        return self.header.size_bytes - len(self.header.raw)

    @property
    def same_layout(self) -> bool:
        """Whether every offset is the base's, so that the whole file may be cloned."""
        return self.base is not None and self.header.raw == self.base.header.raw


def lay_out(
    name: str,
    base: Shard | None,
    jobs: Mapping[str, TensorJob],
    added: Iterable[TensorJob] = (),
    dropped: frozenset[str] = frozenset(),
) -> OutputShard:
    """Lay out one output file.

    Args:
        name: Its file name.
        base: The base's shard, None for a new file.
        jobs: Jobs by tensor name; those of other shards are left aside.
        added: Jobs of tensors to put behind the base's.
        dropped: Names of tensors of the base that the output leaves out.

    Returns:
        The file. Its header is the base's own, byte for byte, where nothing changes.
    """
    added = tuple(added)
    entries = [] if base is None else list(base.header.tensors.values())
    kept = [e for e in entries if e.name not in dropped]
    mine = [jobs[e.name] for e in kept if e.name in jobs]
    unchanged = [(e.name, e.dtype, e.shape) for e in kept]
    changed = {job.name: (job.name, job.dtype, job.shape) for job in (*mine, *added)}
    tensors = [changed.get(row[0], row) for row in unchanged]
    tensors += [changed[job.name] for job in added]
    before = [(e.name, e.dtype, e.shape) for e in entries]
    if base is not None and tensors == before:
        header = base.header
    else:
        metadata = base.header.metadata if base is not None else {"format": "pt"}
        header = build_header(tensors, metadata)
    copies = _copies([e for e in kept if e.name not in jobs], header)
    return OutputShard(name, base, header, copies, (*mine, *added))


def _copies(entries: Iterable[TensorEntry], header: Header) -> tuple[Copy, ...]:
    """Join neighboring tensors that stay neighbors into single copies."""
    copies: list[Copy] = []
    for entry in entries:
        target = header.tensors[entry.name].start
        last = copies[-1] if copies else None
        if (
            last is not None
            and last.source_start + last.n_bytes == entry.start
            and last.target_start + last.n_bytes == target
        ):
            copies[-1] = Copy(last.source_start, last.target_start, last.n_bytes + entry.n_bytes)
        elif entry.n_bytes:
            copies.append(Copy(entry.start, target, entry.n_bytes))
    return tuple(copies)
