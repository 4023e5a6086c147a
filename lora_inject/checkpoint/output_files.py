"""The content of each output file, byte for byte, and the source of each byte.

An output file is a header, some tensors copied from the base, and some that are computed. If no
tensor changes shape or dtype, the header is the base's own and every offset stays the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lora_inject.checkpoint.index import Checkpoint, Shard
from lora_inject.checkpoint.packed import Packed
from lora_inject.core.files.safetensors_file import FLOATS, Header, TensorEntry, build_header
from lora_inject.core.functional.factors import Patch
from lora_inject.core.functional.fold import Tally, with_tally
from lora_inject.core.functional.gain import Gain
from lora_inject.core.functional.merge_report import TensorReport
from lora_inject.errors import CheckpointError


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of a tensor seen as one matrix, in its own memory order."""
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


class Placed(NamedTuple):
    """What a site adds to one tensor: all of its update, or of a stack one matrix."""

    site: str  # name of the site
    source: TensorEntry  # the base's tensor
    terms: tuple[Patch, ...]  # the update, less its frozen start if it has one
    gain: Gain | None  # factor on the outputs of W + the terms (DoRA)

    @property
    def n_cols(self) -> int:
        """Columns of the matrix as which the tensor is seen."""
        return self.terms[0].spec.matrix_shape[1]


@dataclass(eq=False)
class TensorJob:
    """One output tensor whose bytes differ from the base's."""

    base: Checkpoint
    name: str  # its name in the output
    # the base's tensor it is made from; None for one that only the adapter has
    source: TensorEntry | None
    dtype: str  # the format's name of its dtype in the output
    shape: tuple[int, ...]  # its dimensions in the output
    placed: tuple[Placed, ...] = ()  # low-rank updates, which see it as the same matrix
    # full tensors of adapters with their weights: `W + sum of w (T - W)`
    trained: tuple[tuple[Tensor, float], ...] = ()
    # the base's values where the adapter carries them (a grown vocabulary), else None
    base_copy: Tensor | None = None
    added: tuple[tuple[Tensor, float], ...] = ()  # vectors to add, with their weights
    rows: tuple[tuple[tuple[int, ...], Tensor], ...] = ()  # rows to replace: `(indices, values)`
    adapters: tuple[str, ...] = ()  # what messages call those that change it

    @classmethod
    def of(cls, base: Checkpoint, name: str, source: TensorEntry | None) -> TensorJob:
        """Return the job of a tensor with this source in the base, or with None."""
        if source is None:
            return cls(base, name, None, base.usual_dtype, ())
        return cls(base, name, source, source.dtype, source.shape)

    @property
    def stored(self) -> bool:
        """Whether the base's files have it under its name."""
        return self.name in self.base.tensors

    @property
    def shard(self) -> str | None:
        """Name of the base's file with its source."""
        return None if self.source is None else self.base.shard_of[self.source.name]

    @property
    def packed(self) -> Packed | None:
        """The quantized tensor that its source shows as floats."""
        return None if self.source is None else self.base.packed.get(self.source.name)

    @property
    def held(self) -> Tensor | None:
        """W, where an adapter holds it and not the base: a copy, or what it trained in full."""
        if self.base_copy is None and (self.source is None or self.grows):
            return self.trained[0][0]
        return self.base_copy

    @property
    def again(self) -> bool:
        """Whether it is quantized again; `dtype` is then the name of its format."""
        return self.packed is not None and self.dtype not in FLOATS

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the output's tensors that are computed for it."""
        if self.packed is None or not self.again:
            return (self.name,)
        return tuple(self.packed.parts[role].name for role in self.packed.written)

    @property
    def action(self) -> str:
        """The kind of change: `folded`, `replaced`, `added`, `untied`, `cast` or `dequantized`."""
        if self.trained:
            return "replaced" if self.stored else "added"
        if self.rows and not self.placed:
            return "replaced"
        if self.adapters or not self.stored:
            return "folded" if self.stored else "untied"
        return "cast" if self.packed is None else "dequantized"

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the adapters' sites and tensors that change it."""
        whole = (self.name,) if self.trained or self.added or self.rows else ()
        return tuple(dict.fromkeys([*(place.site for place in self.placed), *whole]))

    @property
    def grows(self) -> bool:
        """Whether it has another shape than the base's tensor."""
        return self.source is not None and self.shape != self.source.shape

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of the tensor as the matrix that the terms are on, or whose rows are packed."""
        if not self.placed and self.packed is None:
            return matrix_of(self.shape)
        n_cols = self.placed[0].n_cols if self.placed else self.shape[-1]
        return math.prod(self.shape) // n_cols, n_cols

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


@dataclass(frozen=True)
class OutputShard:
    """One file of the output."""

    name: str  # its plain file name
    base: Shard  # the base's file of that name
    header: Header
    # what is computed, and tensors of `base` that are copied, in the order of the file; a tensor
    # that is quantized again stands where its first part is
    content: tuple[TensorJob | TensorEntry, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return self.header.size_bytes

    @property
    def data_bytes(self) -> int:
        """Bytes of all its tensors."""
        return self.n_bytes - len(self.header.raw)

    @property
    def copied_bytes(self) -> int:
        """Bytes of the tensors that are copied."""
        return sum(part.n_bytes for part in self.content if isinstance(part, TensorEntry))

    @property
    def jobs(self) -> tuple[TensorJob, ...]:
        """The tensors to compute."""
        return tuple(part for part in self.content if isinstance(part, TensorJob))

    @property
    def same_layout(self) -> bool:
        """Whether every offset is the base's."""
        return self.header.raw == self.base.header.raw


def lay_out(checkpoint: Checkpoint, jobs: Mapping[str, TensorJob]) -> tuple[OutputShard, ...]:
    """Lay out the output's files; the last one gets the tensors that the base lacks."""
    dropped = checkpoint.hidden - jobs.keys()
    if any(entry.dtype not in FLOATS for entry in checkpoint.shown.values()):
        dropped = frozenset()  # quantized tensors stay so
    by_output = {name: job for job in jobs.values() for name in job.outputs}
    new: dict[str, list[TensorJob]] = {name: [] for name in checkpoint.shards}
    for job in jobs.values():  # those that have another name when unpacked
        if job.packed is not None and job.stored and not job.again:
            shard = checkpoint.shards[checkpoint.shard_of[job.name]]
            new[shard.name] += [job] if job.name not in shard.header.tensors else []
    new[[*new][-1]] += [job for job in jobs.values() if not job.stored]
    shards = []
    for shard in checkpoint.shards.values():
        content: list[TensorJob | TensorEntry] = []
        heads: list[TensorJob | TensorEntry] = []  # each with name, dtype and shape as in the file
        for entry in shard.header.tensors.values():
            if entry.name not in dropped:
                part = by_output.get(entry.name, entry)
                content.append(part)
                heads.append(entry if isinstance(part, TensorJob) and part.again else part)
        content += new[shard.name]
        header = _header([*heads, *new[shard.name]], shard)
        shards.append(OutputShard(shard.name, shard, header, (*dict.fromkeys(content),)))
    return tuple(shards)


def _header(heads: Sequence[TensorJob | TensorEntry], base: Shard) -> Header:
    """Return the header of a file: the base's if that is right."""
    tensors = [(head.name, head.dtype, head.shape) for head in heads]
    there = [(entry.name, entry.dtype, entry.shape) for entry in base.header.tensors.values()]
    return base.header if tensors == there else build_header(tensors, base.header.metadata)
