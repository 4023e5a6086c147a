"""The content of each output file, byte for byte, and the source of each byte.

An output file is a header, some ranges copied from the base, and some tensors that are computed. If
no tensor changes shape or dtype, the header is the base's own and every offset stays the same. The
kernel then copies everything but the merged tensors in long runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_inject.checkpoint.index import Checkpoint, Shard
from lora_inject.checkpoint.packed import Packed
from lora_inject.checkpoint.place import Placed, matrix_of
from lora_inject.core.files.safetensors_file import FLOATS, Header, TensorEntry, build_header
from lora_inject.core.functional.merge_report import TensorReport
from lora_inject.core.functional.rounded_fold import Tally, with_tally
from lora_inject.errors import CheckpointError


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
    packed: Packed | None = None  # reader of a quantized source
    added: tuple[tuple[Tensor, float], ...] = ()  # vectors to add, with their weights
    rows: tuple[tuple[tuple[int, ...], Tensor], ...] = ()  # rows to replace: `(indices, values)`
    adapters: tuple[str, ...] = ()  # what messages call those that change it

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
    def again(self) -> bool:
        """Whether it is quantized again; `dtype` is then the name of its format."""
        return self.packed is not None and self.dtype not in FLOATS

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the output's tensors that are computed for it."""
        if self.packed is None or not self.again:
            return (self.name,)
        parts, written = self.packed.parts, self.packed.written
        return tuple(parts[role].name for role in written if role in parts)

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

    @property
    def grows(self) -> bool:
        """Whether it has another shape than the base's tensor."""
        return self.source is not None and self.shape != self.source.shape

    def joined(self, other: TensorJob) -> TensorJob:
        """Return this job combined with a later adapter's job on the same tensor."""
        if self.base_copy is not None and other.base_copy is not None:
            raise clash(self.name, "both hold a copy of it", self.adapters + other.adapters)
        reshapes = other.trained or other.base_copy is not None
        return replace(
            self,
            shape=other.shape if reshapes else self.shape,
            base_copy=self.base_copy if other.base_copy is None else other.base_copy,
            placed=self.placed + other.placed,
            trained=self.trained + other.trained,
            added=self.added + other.added,
            rows=self.rows + other.rows,
            adapters=self.adapters + other.adapters,
        )

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of the tensor seen as the matrix that the terms are on."""
        if not self.placed:
            return matrix_of(self.shape)
        n_cols = self.placed[0].n_cols
        return torch.Size(self.shape).numel() // n_cols, n_cols

    def report(self, tally: Tally) -> TensorReport:
        """Return a report of what was done to the tensor."""
        dtype = str(FLOATS.get(self.dtype, self.dtype)).removeprefix("torch.")
        row = TensorReport(self.name, self.action, dtype, self.shape, self.sites)
        return with_tally(row, tally)


def clash(name: str, problem: str, adapters: Sequence[str] = ()) -> CheckpointError:
    """Return the error for updates of one tensor that exclude each other."""
    remedy = "Merge one adapter after the other, or leave one out"
    both = f"{' and '.join(adapters)} " if len(adapters) > 1 else ""
    return CheckpointError(f"merge {both}into '{name}'", problem, remedy)


class Copy(NamedTuple):
    """An unchanged range of bytes: its place in the base's shard and in the output's."""

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
        """Whether every offset is the base's, so that the whole file can be cloned."""
        return self.base is not None and self.header.raw == self.base.header.raw


def lay_out(checkpoint: Checkpoint, jobs: Mapping[str, TensorJob]) -> tuple[OutputShard, ...]:
    """Lay out the output's files; tensors that the base lacks get a separate file.

    A checkpoint of one file without an index stays one file.
    """
    one_file, dropped = checkpoint.index_name is None, checkpoint.hidden - jobs.keys()
    if any(entry.dtype not in FLOATS for entry in checkpoint.shown.values()):
        dropped = frozenset()  # quantized tensors stay so
    by_output = {name: job for job in jobs.values() for name in job.outputs}
    added = [job for job in jobs.values() if not job.stored]
    shards = []
    for shard in checkpoint.shards.values():
        more = _renamed_in(shard, checkpoint, jobs) + (added if one_file else [])
        shards.append(_lay_out(shard.name, shard, by_output, more, dropped))
    if added and not one_file:
        name = f"{checkpoint.stem}-added.safetensors"
        while name in checkpoint.shards:
            name = name.replace("-added", "-added-added", 1)
        shards.append(_lay_out(name, None, {}, added, frozenset()))
    return tuple(shards)


def _renamed_in(
    shard: Shard, checkpoint: Checkpoint, jobs: Mapping[str, TensorJob]
) -> list[TensorJob]:
    """Return the jobs of packed tensors of a file that have another name when unpacked."""
    names = [name for name, job in jobs.items() if name in checkpoint.packed and not job.again]
    return [
        jobs[name]
        for name in names
        if jobs[name].source_shard == shard.name and name not in shard.header.tensors
    ]


def _lay_out(
    name: str,
    base: Shard | None,
    jobs: Mapping[str, TensorJob],
    added: Iterable[TensorJob],
    dropped: frozenset[str],
) -> OutputShard:
    """Lay out one file: `added` behind the base's tensors, without those that are `dropped`.

    `jobs` are by the names of the tensors that are computed for them.
    """
    entries = [] if base is None else list(base.header.tensors.values())
    staying = [entry for entry in entries if entry.name not in dropped]
    unchanged = [entry for entry in staying if entry.name not in jobs]
    computed = {jobs[e.name].name: jobs[e.name] for e in staying if e.name in jobs}
    rows: list[TensorJob | TensorEntry] = []
    for entry in staying:
        job = jobs.get(entry.name)
        rows.append(entry if job is None or job.again else job)
    header = _header_of([*rows, *added], base)
    return OutputShard(name, base, header, _copies(unchanged, header), (*computed.values(), *added))


def header_digest(header: Header) -> str:
    """Return the SHA-256 of a header as it is in the file, in hexadecimal."""
    return hashlib.sha256(header.raw).hexdigest()


def _header_of(rows: Iterable[TensorJob | TensorEntry], base: Shard | None) -> Header:
    """Return the header of a file with some tensors: the base's own one if it is right."""
    tensors = [(row.name, row.dtype, row.shape) for row in rows]
    if base is None:
        return build_header(tensors, {"format": "pt"})
    entries = base.header.tensors.values()
    if tensors == [(entry.name, entry.dtype, entry.shape) for entry in entries]:
        return base.header
    return build_header(tensors, base.header.metadata)


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
