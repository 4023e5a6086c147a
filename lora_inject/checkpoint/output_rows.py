"""Computing the rows of an output tensor from the base's rows and the adapters.

Every output row depends on the same row of the base and on small factors only, so a
tensor of any size is worked through in blocks of one size, which can be dealt to threads. The
arithmetic is that of `functional.fold_rows`: float32 (float64 for float64), one rounding at the
end, however many adapters take part.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_inject.checkpoint.output_files import FLOATS, TensorJob
from lora_inject.checkpoint.read import Room, RowReader, page_out, rows_per_block
from lora_inject.errors import CheckpointError
from lora_inject.functional import (
    Delta,
    Scratch,
    Tally,
    TensorReport,
    Term,
    block_rows,
    fold_rows,
    mix_copies,
)

SPAN_ELEMENTS = 1 << 24
"""Elements that one thread takes at a time: many blocks, and a small part of a large tensor."""


@dataclass(frozen=True)
class Span:
    """Some rows of one output tensor, and the terms that fall on them.

    Attributes:
        job: The tensor.
        n_cols: Columns of its matrix.
        start: First row.
        stop: First row after.
        offset: Row that the terms' matrix begins at.
        terms: Low-rank updates.
    """

    job: TensorJob
    n_cols: int
    start: int
    stop: int
    offset: int
    terms: tuple[Term, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in the output."""
        return self.n_cols * FLOATS[self.job.dtype].itemsize


def spans_of(job: TensorJob) -> Iterator[Span]:
    """Cut a tensor into spans: at the limits of its terms, and at `SPAN_ELEMENTS`."""
    n_rows, n_cols = job.matrix
    if (
        not job.placed and not job.rows and job.scales is None
    ):  # any shape: its values are worked on one by one
        n_rows, n_cols = n_rows * n_cols, 1
    limits = sorted({0, n_rows, *(r for p in job.placed for r in (p.start, p.stop))})
    for first, last in itertools.pairwise(limits):
        terms = tuple(
            term for p in job.placed if p.start <= first and last <= p.stop for term in p.terms
        )
        step = max(1, SPAN_ELEMENTS // max(1, n_cols))
        if job.magnitude is not None and job.transposed:
            step = last - first  # the norms need all rows: one thread reads the tensor twice
        for start in range(first, last, step):
            yield Span(job, n_cols, start, min(last, start + step), first, terms)


class Memory:
    """Memory that one thread reuses for every block.

    Attributes:
        scratch: Of the arithmetic.
        output: Of rows that cannot take the place of those that were read.
        on_disk: Whether adapters' tensors are views of a mapped file.
    """

    def __init__(self, on_disk: bool = False) -> None:
        self.scratch = Scratch()
        self.output = Room()
        self.on_disk = on_disk


class Block(NamedTuple):
    """Some computed rows, valid until the next.

    Attributes:
        start: First row.
        rows: `(n, n_cols)` in the output's dtype.
        data: Their bytes.
        tally: What was counted so far.
    """

    start: int
    rows: Tensor
    data: memoryview
    tally: Tally


def fold_span(span: Span, reader: RowReader | None, memory: Memory) -> Iterator[Block]:
    """Compute a span block by block.

    Args:
        span: The rows.
        reader: Of the base's shard that holds the source; None where there is no source.
        memory: This thread's.

    Yields:
        The rows, in the reader's memory or in the `output` of this thread's.

    Raises:
        CheckpointError: A value is not finite.
    """
    folding = _Folding(span, reader, memory)
    step = rows_per_block(span.n_cols, 2 if folding.in_place else 1)
    for start in range(span.start, span.stop, step):
        yield folding.block(start, min(span.stop, start + step))
    for term in span.terms if memory.on_disk else ():
        page_out(term.A)
        page_out(term.B)


class _Folding:
    """What the blocks of a span have in common."""

    def __init__(self, span: Span, reader: RowReader | None, memory: Memory) -> None:
        job = span.job
        self.span, self.job, self.reader, self.memory = span, job, reader, memory
        self.in_place = _in_place(span)
        is_double = job.source is not None and job.source.dtype == "F64"
        wide = torch.float64 if is_double else torch.float32
        self.delta, self.tally = Delta(span.terms, wide), Tally()
        self.scales = _read_scales(job)
        self.factors = None
        if job.magnitude is not None:
            self.factors = _factors(span, reader, self.delta, wide, self.scales)

    def block(self, start: int, stop: int) -> Block:
        """Compute rows `start` to `stop`."""
        rows, job, n_cols = self.rows(start, stop), self.job, self.span.n_cols
        if self.in_place and self.reader is not None:
            room, merged = self.reader.room, rows
        else:
            room = self.memory.output
            merged = room.rows(FLOATS[job.dtype], stop - start, n_cols)
        self.fold(rows, start - self.span.offset, merged)
        for indices, values in job.rows:
            for at, index in enumerate(indices):
                if start <= index < stop:
                    merged[index - start] = values[at].detach().to(merged.dtype)
        if not (self.tally.finite if self.span.terms else _kept_finite(rows, merged)):
            found = merged.clone()
            _check_finite(job, self.rows(start, stop), found)
            merged.copy_(found)  # the base's rows may have been read into its place
        return Block(start, merged, room.bytes_of(merged), self.tally)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return what the deltas are added to."""
        rows = _base_rows(self.span, self.reader, start, stop, self.scales)
        if self.job.trained or self.job.added:
            rows = _with_vectors(self.job, rows, self.span.n_cols, start, stop)
        return rows

    def fold(self, rows: Tensor, at: int, merged: Tensor) -> None:
        """Write rows with all deltas on them to `merged`; `at` is their place in the matrix."""
        if self.factors is not None:
            _fold_scaled(rows, at, self.delta, self.factors, self.tally, merged)
        elif self.span.terms:
            pieces, scratch = block_rows(rows), self.memory.scratch
            fold_rows(rows, at, self.delta, None, self.tally, scratch, merged, pieces)
        else:
            merged.copy_(rows)


def _in_place(span: Span) -> bool:
    """Return whether the rows can become the output where they were read: half of the memory."""
    job = span.job
    return (
        bool(span.terms)
        and job.source is not None
        and job.shape == job.source.shape
        and job.dtype == job.source.dtype
        and job.base_copy is None
        and job.scales is None
        and job.magnitude is None
        and not (job.trained or job.added)
    )


def _fold_scaled(
    rows: Tensor, start: int, delta: Delta, factors: _Factors, tally: Tally, merged: Tensor
) -> None:
    """Fold rows of a DoRA weight: `m (W + D) / |W + D|`."""
    before = rows.to(factors.magnitude.dtype)
    wanted = factors.apply_(delta.add_(before.clone(), start), start)
    tally.add(before, wanted, merged.copy_(wanted))


@dataclass(frozen=True)
class _Factors:
    """DoRA's `m / |W + delta|`, the norm over the inputs of each output.

    Attributes:
        magnitude: `(out,)`.
        norms: `(out,)` where the outputs are columns, None where they are rows: then a block has
            all that it takes.
    """

    magnitude: Tensor
    norms: Tensor | None

    def apply_(self, total: Tensor, start: int) -> Tensor:
        if self.norms is not None:
            return total.mul_(self.magnitude / self.norms)
        magnitude = self.magnitude[start : start + total.shape[0]]
        return total.mul_((magnitude / torch.linalg.vector_norm(total, dim=1)).unsqueeze(1))


def _factors(
    span: Span,
    reader: RowReader | None,
    delta: Delta,
    wide: torch.dtype,
    scales: Tensor | None,
) -> _Factors:
    """Prepare DoRA's factors; for outputs that are columns this reads the tensor once more."""
    assert span.job.magnitude is not None
    magnitude = span.job.magnitude.detach().to(wide).flatten()
    if not span.job.transposed:
        return _Factors(magnitude, None)
    squares = torch.zeros(span.n_cols, dtype=torch.float64)
    step = rows_per_block(span.n_cols)
    for start in range(span.start, span.stop, step):
        rows = _base_rows(span, reader, start, min(span.stop, start + step), scales)
        total = delta.add_(rows.to(wide, copy=True), start - span.offset)
        squares += total.square().sum(dim=0, dtype=torch.float64)
    return _Factors(magnitude, squares.sqrt().to(wide))


def _read_scales(job: TensorJob) -> Tensor | None:
    """Return the whole table of scales of a float8 source, float32; None where there is none."""
    if job.scales is None:
        return None
    entry = job.scales.entry
    with RowReader(job.scales.path) as reader:
        return reader.rows(entry, entry.shape[1], 0, entry.shape[0]).to(torch.float32, copy=True)


def _base_rows(
    span: Span, reader: RowReader | None, start: int, stop: int, scales: Tensor | None = None
) -> Tensor:
    job = span.job
    if job.base_copy is not None:
        return _rows_of(job.base_copy, span.n_cols, start, stop)
    if job.source is None or reader is None or job.shape != job.source.shape:
        if not job.trained:
            raise CheckpointError(f"merge into '{job.name}'", "it has no values", "Report this")
        return _rows_of(job.trained[0][0], span.n_cols, start, stop)
    rows = reader.rows(job.source, span.n_cols, start, stop)
    if job.scales is None:
        return rows
    assert scales is not None
    return job.scales.apply(rows, start, scales)


def _rows_of(tensor: Tensor, n_cols: int, start: int, stop: int) -> Tensor:
    return tensor.detach().reshape(-1, n_cols)[start:stop]


def _with_vectors(job: TensorJob, rows: Tensor, n_cols: int, start: int, stop: int) -> Tensor:
    """Return `W + sum of w (T - W) + sum of w b`: exactly T for one adapter of weight 1."""
    dtypes = {rows.dtype, *(t.dtype for t, _ in job.trained)}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    total = mix_copies(rows, [(_rows_of(t, n_cols, start, stop), w) for t, w in job.trained], wide)
    for tensor, weight in job.added:
        total += weight * _rows_of(tensor, n_cols, start, stop).to(wide)
    return total


def _kept_finite(rows: Tensor, merged: Tensor) -> bool:
    """Return whether a cast can have made nothing infinite, by a quick look."""
    return merged.dtype == rows.dtype or math.isfinite(float(merged.sum(dtype=torch.float64)))


def _check_finite(job: TensorJob, rows: Tensor, merged: Tensor) -> None:
    """Look closely: a mask's own -Inf may stay, what became Inf may not."""
    finite = torch.isfinite(merged)
    if bool(finite.all()):
        return
    if not bool(torch.isfinite(rows).all()):
        if job.placed:
            raise CheckpointError(
                f"merge into '{job.name}'",
                "the base holds NaN or Inf there",
                "The base is damaged; fetch it again",
            )
        if not bool((torch.isfinite(rows) & ~finite).any()):
            return
    raise CheckpointError(
        f"merge into '{job.name}'",
        f"the result is too large for {job.dtype}: it would become Inf",
        "Write float32 or bfloat16 (dtype), or merge with a smaller weight",
    )


def combine(job: TensorJob, of_spans: Sequence[Tally]) -> TensorReport:
    """Sum what was counted in a tensor's spans, in their order, into its report."""
    dtype = str(FLOATS[job.dtype]).removeprefix("torch.")
    report = TensorReport(job.name, job.action, dtype, job.shape, job.sites)
    return report.counted(sum(of_spans, Tally()))
