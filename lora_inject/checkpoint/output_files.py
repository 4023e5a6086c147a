"""What each output file will hold, byte for byte, and where each byte comes from.

An output file is a header, some ranges copied from the base, and some tensors that are computed.
Where nothing changes shape or dtype the header is the base's own and every offset stays, so that
all but the merged tensors is copied in long runs by the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

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

FORMAT_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The format's names of dtypes that a checkpoint can be written in."""

READABLE: Mapping[str, torch.dtype] = {
    **FLOATS,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Dtypes whose values can be read."""


@dataclass
class TensorJob:
    """One output tensor whose bytes are not those of the base; settled once the plan is made.

    Attributes:
        name: Its name in the output.
        source: The base's tensor it is made from; None for one that only the adapter has.
        source_shard: Name of the shard that holds `source`.
        dtype: The format's name of its dtype in the output.
        shape: Its dimensions in the output.
        action: `folded`, `replaced`, `added`, `untied`, `cast` or `dequantized`.
        placed: Low-rank terms, on disjoint ranges of rows or on the same one.
        trained: Full tensors of adapters with their weights: `W + sum of w (T - W)`.
        base_copy: The base's values where the adapter carries them (a grown vocabulary), else None.
        packed: What reads the values of a quantized source (`dequantized.Packed`), else None.
        added: Vectors to add, with their weights.
        rows: Rows to replace: `(indices, values)`.
        sites: Names of the adapters' sites and tensors that went into it.
    """

    name: str
    source: TensorEntry | None
    source_shard: str | None
    dtype: str
    shape: tuple[int, ...]
    action: str = "folded"
    placed: tuple[Placed, ...] = ()
    trained: tuple[tuple[Tensor, float], ...] = ()
    base_copy: Tensor | None = None
    packed: Any = None
    added: tuple[tuple[Tensor, float], ...] = ()
    rows: tuple[tuple[tuple[int, ...], Tensor], ...] = ()
    sites: tuple[str, ...] = ()

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of the tensor seen as the matrix that the terms are on."""
        if not self.placed:
            return matrix_of(self.shape)
        n_cols = self.placed[0].n_cols
        return torch.Size(self.shape).numel() // n_cols, n_cols

    @property
    def transposed(self) -> bool:
        """Whether the outputs are the matrix's columns."""
        return any(term.spec.transposed for place in self.placed for term in place.terms)


class Copy(NamedTuple):
    """A range of bytes that stays as it is: its place in the base's shard and in the output's."""

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
    def n_bytes(self) -> int:
        """Size of the file."""
        return self.header.size_bytes

    @property
    def data_bytes(self) -> int:
        """Bytes of all its tensors."""
        return self.n_bytes - len(self.header.raw)

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
    """Lay out one output file; its header is the base's own, byte for byte, if nothing changes.

    `base` is None for a new file, `jobs` may hold those of other shards, `added` goes behind the
    base's tensors, and `dropped` are names of the base's that the output leaves out.
    """
    entries = [] if base is None else list(base.header.tensors.values())
    kept = [entry for entry in entries if entry.name not in dropped]
    mine = [jobs[entry.name] for entry in kept if entry.name in jobs]
    added = tuple(added)
    rows: list[TensorJob | TensorEntry] = [*(jobs.get(entry.name, entry) for entry in kept), *added]
    tensors = [(row.name, row.dtype, row.shape) for row in rows]
    if base is not None and tensors == [(e.name, e.dtype, e.shape) for e in entries]:
        header = base.header
    else:
        header = build_header(tensors, base.header.metadata if base else {"format": "pt"})
    copies = _copies([entry for entry in kept if entry.name not in jobs], header)
    return OutputShard(name, base, header, copies, (*mine, *added))


def _copies(entries: Iterable[TensorEntry], header: Header) -> tuple[Copy, ...]:
    """Join neighboring tensors that stay neighbors into single copies."""
    copies: list[Copy] = []
    for entry in entries:
        copy = Copy(entry.start, header.tensors[entry.name].start, entry.n_bytes)
        source, target, n_bytes = copies[-1] if copies else Copy(-1, -1, 0)
        if (source + n_bytes, target + n_bytes) == copy[:2]:
            copies[-1] = Copy(source, target, n_bytes + copy.n_bytes)
        elif copy.n_bytes:
            copies.append(copy)
    return tuple(copies)
