"""What each output file will hold, byte for byte, and where each byte comes from.

An output file is a header, some ranges copied from the base, and some tensors that are computed.
Where nothing changes shape or dtype the header is the base's own and every offset stays, so that
all but the merged tensors is copied in long runs by the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_inject.checkpoint.index import Checkpoint, Shard
from lora_inject.checkpoint.place import Placed, matrix_of
from lora_inject.errors import CheckpointError
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
    """One output tensor whose bytes differ from the base's."""

    name: str  # its name in the output
    # the base's tensor it is made from; None for one that only the adapter has
    source: TensorEntry | None
    source_shard: str | None  # name of the shard that holds `source`
    dtype: str  # the format's name of its dtype in the output
    shape: tuple[int, ...]  # its dimensions in the output
    stored: bool = True  # whether the base's files have it under its name
    reason: str = ""  # why it is written without an update: `cast` or `dequantized`
    placed: tuple[Placed, ...] = ()  # low-rank terms, on disjoint ranges of rows or on the same one
    # full tensors of adapters with their weights: `W + sum of w (T - W)`
    trained: tuple[tuple[Tensor, float], ...] = ()
    # the base's values where the adapter carries them (a grown vocabulary), else None
    base_copy: Tensor | None = None
    # reader of a quantized source (`dequantized.Packed`), else None
    packed: Any = None
    added: tuple[tuple[Tensor, float], ...] = ()  # vectors to add, with their weights
    rows: tuple[tuple[tuple[int, ...], Tensor], ...] = ()  # rows to replace: `(indices, values)`

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, name: str, source: TensorEntry | None, reason: str = ""
    ) -> TensorJob:
        """Return the job of a tensor with this source in the base, or with None."""
        if source is None:  # of the dtype that most of the base's values have
            sizes = dict.fromkeys(FLOATS, 0)
            for other in checkpoint:
                if other.dtype in sizes:
                    sizes[other.dtype] += other.n_elements
            return cls(name, None, None, max(sizes, key=lambda d: sizes[d]), (), stored=False)
        shard, packed = checkpoint.shard_of[source.name], checkpoint.packed.get(source.name)
        stored = name in checkpoint.tensors
        return cls(name, source, shard, source.dtype, source.shape, stored, reason, packed=packed)

    @property
    def action(self) -> str:
        """The kind of change: `folded`, `replaced`, `added`, `untied`, `cast` or `dequantized`."""
        if self.trained:
            return "replaced" if self.stored else "added"
        if self.rows and not self.placed:
            return "replaced"
        return self.reason or ("folded" if self.stored else "untied")

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the adapters' sites and tensors that change it."""
        whole = (self.name,) if self.trained or self.added or self.rows else ()
        return tuple(dict.fromkeys([*(place.site for place in self.placed), *whole]))

    def joined(self, other: TensorJob) -> TensorJob:
        """Return this job combined with a later adapter's job on the same tensor."""
        if self.base_copy is not None and other.base_copy is not None:
            raise clash(self.name, "two adapters hold a copy of it")
        reshapes = other.trained or other.base_copy is not None
        return replace(
            self,
            shape=other.shape if reshapes else self.shape,
            base_copy=self.base_copy if other.base_copy is None else other.base_copy,
            placed=self.placed + other.placed,
            trained=self.trained + other.trained,
            added=self.added + other.added,
            rows=self.rows + other.rows,
        )

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


def clash(name: str, found: str) -> CheckpointError:
    """Return the error for updates of one tensor that exclude each other."""
    remedy = "Merge one adapter after the other, or leave one out"
    return CheckpointError(f"merge into '{name}'", found, remedy)


class Copy(NamedTuple):
    """A range of bytes that stays as it is: its place in the base's shard and in the output's."""

    source_start: int
    target_start: int
    n_bytes: int


@dataclass(frozen=True)
class OutputShard:
    """One file of the output."""

    name: str  # its plain file name
    base: Shard | None  # the base's shard of the same name, None for a new one
    header: Header
    copies: tuple[Copy, ...]  # ranges to copy from `base`
    jobs: tuple[TensorJob, ...]  # tensors to compute

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
