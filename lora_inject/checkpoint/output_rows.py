"""Computing the rows of an output tensor from the base's rows and the adapters.

Every output row depends only on the same row of the base and on small factors. So a tensor of any
size is computed in blocks of one size, which threads share. The arithmetic is that of
`functional.fold_rows`: float32 (float64 for float64), with one rounding at the end for any number
of adapters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_inject.checkpoint.output_files import TensorJob
from lora_inject.checkpoint.packed import Packed
from lora_inject.errors import CheckpointError
from lora_inject.functional import Delta, Gain, Tally, Term, fold_rows, mix_copies
from lora_inject.storage.tensor_rows import FLOATS, Room, RowReader, rows_per_block
from lora_inject.storage.tensors import bytes_of, in_memory

SPAN_ELEMENTS = 1 << 24
"""Elements that one thread takes at a time: many blocks, and a small part of a large tensor."""


class Span(NamedTuple):
    """Some rows of one output tensor, with the terms and the gain that apply to them."""

    job: TensorJob
    n_cols: int
    start: int
    stop: int
    offset: int  # the row that the terms' matrix begins at
    terms: tuple[Term, ...]
    gain: Gain | None

    @property
    def first_byte(self) -> int:
        """First byte of its rows in the tensor; a tensor that is quantized again is one span."""
        return self.start and self.start * self.n_cols * FLOATS[self.job.dtype].itemsize


def spans_of(job: TensorJob) -> Iterator[Span]:
    """Cut a tensor into spans: at the limits of its terms, and at `SPAN_ELEMENTS`."""
    n_rows, n_cols = job.matrix
    if not (job.placed or job.rows or job.packed):  # it is computed elementwise
        n_rows, n_cols = n_rows * n_cols, 1
    limits = sorted({0, n_rows, *(r for p in job.placed for r in (p.start, p.stop))})
    for first, last in itertools.pairwise(limits):
        on = [p for p in job.placed if p.start <= first and last <= p.stop]
        terms = tuple(term for place in on for term in place.terms)
        step = max(1, SPAN_ELEMENTS // max(1, n_cols))
        gain = next((place.gain for place in on if place.gain is not None), None)
        if job.again or (gain is not None and any(term.spec.transposed for term in terms)):
            step = last - first  # one thread: scales, and norms of columns, are of many rows
        for start in range(first, last, step):
            yield Span(job, n_cols, start, min(last, start + step), first, terms, gain)


class Folding:
    """Computes the rows of a span block by block.

    `reader` reads the base's shard of the source; None without a source. If possible, computed rows
    overwrite the rows that were read, which halves the memory; otherwise they are in `room`.
    `tally` counts the part of the delta that is left after rounding.
    """

    def __init__(self, span: Span, reader: RowReader | None, room: Room, tally: Tally) -> None:
        job = span.job
        self.span, self.job, self.reader = span, job, reader
        self.room, self.tally = room, tally
        self.in_place = bool(span.terms) and (
            job.source is not None
            and (job.shape, job.dtype) == (job.source.shape, job.source.dtype)
            and not any(x is not None for x in (job.base_copy, job.packed, span.gain))
            and not (job.trained or job.added)
        )
        is_double = job.source is not None and job.source.dtype == "F64"
        self.wide = torch.float64 if is_double else torch.float32
        self.delta = Delta(span.terms, self.wide, span.gain)
        self.values = None if job.packed is None else job.packed.rows()
        if span.gain is not None:
            blocks = self._limits(1)
            self.delta.norms_of((a - span.offset, self.stored(a, b)) for a, b in blocks)

    def pieces(self) -> Iterator[tuple[str, memoryview]]:
        """Yield `(tensor, bytes)` of the output in their order, each valid until the next."""
        if self.job.packed is not None and self.job.again:
            yield from self._encoded(self.job.packed)
            return
        for start, stop in self._limits(2 if self.in_place else 1):
            yield self.job.name, self._block(start, stop)

    def _encoded(self, packed: Packed) -> Iterator[tuple[str, memoryview]]:
        """Yield the parts of a tensor that is quantized again, and count what that keeps."""
        n_cols, tally, stored = self.span.n_cols, self.tally, packed.rows()
        for start, stop in self._limits(1, packed.unit):
            self.tally = Tally()  # of rounding to float32, which is not the output's
            data = self._block(start, stop)
            wanted = torch.frombuffer(data, dtype=torch.float32).view(-1, n_cols)
            parts = packed.encoded(wanted)
            made = replace(packed, shape=tuple(wanted.shape), held=parts)
            before, found = stored(start, stop), made.rows()(0, len(wanted))
            tally.count(before, wanted - before, wanted - found)
            if not tally.finite:
                raise _too_large(self.job)
            for role, part in parts.items():
                yield packed.parts[role].name, memoryview(bytes_of(part))

    def _limits(self, n_blocks: int, unit: int = 1) -> Iterator[tuple[int, int]]:
        step = max(unit, rows_per_block(self.span.n_cols, n_blocks) // unit * unit)
        for start in range(self.span.start, self.span.stop, step):
            yield start, min(self.span.stop, start + step)

    def _block(self, start: int, stop: int) -> memoryview:
        """Compute rows `start` to `stop`, and return their bytes."""
        stored, job, at = self.base(start, stop), self.job, start - self.span.offset
        rows = self._with_rows(stored, start)
        if self.in_place and self.reader is not None:
            room, merged = self.reader.room, stored
        else:
            room = self.room
            dtype = FLOATS.get(job.dtype, torch.float32)
            merged = room.rows(dtype, stop - start, self.span.n_cols)
        if self.span.terms:
            fold_rows(rows, at, self.delta, self.tally, merged)
        else:
            merged.copy_(rows)
        if not (self.tally.finite if self.span.terms else _kept_finite(rows, merged)):
            found = merged.clone()
            _check_finite(job, self._with_rows(self.base(start, stop), start), found)
            merged.copy_(found)  # the base's rows may have been read into its place
        return room.data

    def base(self, start: int, stop: int) -> Tensor:
        """Return what the deltas are added to: `W + sum of w (T - W) + sum of w b`.

        Exactly T for one adapter of weight 1.
        """
        job, n_cols = self.job, self.span.n_cols
        rows = self.stored(start, stop)
        if not (job.trained or job.added):
            return rows
        dtypes = {rows.dtype, *(t.dtype for t, _ in job.trained)}
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        copies = [(_rows_of(t, n_cols, start, stop), weight) for t, weight in job.trained]
        total = mix_copies(rows, copies, wide)
        for tensor, weight in job.added:
            total += weight * _rows_of(tensor, n_cols, start, stop).to(wide)
        return total

    def _with_rows(self, rows: Tensor, start: int) -> Tensor:
        """Return rows from `start` on, with replaced rows of adapters; deltas are added later."""
        inside = [
            (index - start, values[at])
            for indices, values in self.job.rows
            for at, index in enumerate(indices)
            if start <= index < start + len(rows)
        ]
        if inside:
            rows = rows.to(self.wide, copy=True)
        for row, value in inside:
            rows[row] = value.detach()
        return rows

    def stored(self, start: int, stop: int) -> Tensor:
        """Return W, from the base, or from an adapter that holds it."""
        job, n_cols = self.job, self.span.n_cols
        if job.base_copy is not None:
            return _rows_of(job.base_copy, n_cols, start, stop)
        if job.source is None or self.reader is None or job.grows:
            return _rows_of(job.trained[0][0], n_cols, start, stop)
        if self.values is not None:
            return self.values(start, stop)
        return self.reader.rows(job.source, n_cols, start, stop)


def _rows_of(tensor: Tensor, n_cols: int, start: int, stop: int) -> Tensor:
    return in_memory(tensor.detach().reshape(-1, n_cols)[start:stop])


def _kept_finite(rows: Tensor, merged: Tensor) -> bool:
    """Return whether a quick check shows that a cast made nothing infinite."""
    return merged.dtype == rows.dtype or math.isfinite(float(merged.sum(dtype=torch.float64)))


def _check_finite(job: TensorJob, rows: Tensor, merged: Tensor) -> None:
    """Check each value: -Inf of a mask may stay; a value that became Inf is an error."""
    finite, finite_before = torch.isfinite(merged), torch.isfinite(rows)
    if job.placed and not bool(finite_before.all()):
        found, remedy = "the base holds NaN or Inf there", "The base is damaged; fetch it again"
        raise CheckpointError(f"merge into '{job.name}'", found, remedy)
    if bool((finite_before & ~finite).any()):
        raise _too_large(job)


def _too_large(job: TensorJob) -> CheckpointError:
    found = f"the result is too large for {job.dtype}: it would become Inf"
    remedy = 'Pass dtype="float32" or dtype="bfloat16", or merge with a smaller weight'
    return CheckpointError(f"merge into '{job.name}'", found, remedy)
