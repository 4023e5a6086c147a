"""Threads compute an output file, and write it durably or compare it with an existing one.

Everything is read from the base and nothing from the output. So writing a file again is always
right: no update can be added twice. Writing and verifying differ only in the sink, which takes each
piece of bytes.

Every output row depends only on the same row of the base and on small factors. So a tensor of any
size is computed in blocks of one size, which threads share. The arithmetic is that of
`functional.rounded_fold`: float32 (float64 for float64), with one rounding at the end for any
number of adapters.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lora_inject.checkpoint.disk_copies import clone, copy_range, reserve_bytes, write_at
from lora_inject.checkpoint.index import Checkpoint, Shard
from lora_inject.checkpoint.merge_plan import MergePlan
from lora_inject.checkpoint.output_files import Copy, OutputShard, TensorJob
from lora_inject.checkpoint.packed import Packed
from lora_inject.core.files.row_reader import Room, RowReader, rows_per_block
from lora_inject.core.files.safetensors_file import FLOATS, TensorEntry
from lora_inject.core.files.tensors import bytes_of
from lora_inject.core.functional.factors import Patch
from lora_inject.core.functional.fold import Delta
from lora_inject.core.functional.gain import Gain
from lora_inject.core.functional.merge_report import TensorReport
from lora_inject.core.functional.rounded_fold import GainedDelta, Tally, fold_rows, mix_copies
from lora_inject.errors import CheckpointError

SPAN_ELEMENTS = 1 << 24
"""Elements that one thread takes at a time: many blocks, and a small part of a large tensor."""
COPY_BYTES = 8 << 20
"""Longest single copy: limits the delay of progress reports and of Ctrl-C."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all; from any thread, one call at a time."""


class BytesDone:
    """Adds up bytes over threads, and reports the bytes done and the bytes in all."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress
        self.lock = threading.Lock()

    def __call__(self, n_bytes: int) -> None:
        """Count some more."""
        with self.lock:
            self.done += n_bytes
            if self.progress is not None and n_bytes:
                self.progress(min(self.done, self.total), self.total)


def counting_bytes(sizes: Mapping[str, int], progress: Progress | None) -> Iterator[str]:
    """Yield each name, and report its bytes when the next one is asked for."""
    done = BytesDone(sum(sizes.values()), progress)
    for name, size in sizes.items():
        yield name
        done(size)


class Sink(Protocol):
    """Takes the pieces of an output file, from any thread."""

    def computed(self, entry: TensorEntry, at: int, data: memoryview) -> None:
        """Take computed rows of a tensor, which belong at byte `at` of the file."""

    def copied(self, source: int, copy: Copy) -> None:
        """Take a range of bytes of the base's file that is open as `source`."""


class _Written:
    """The file being written.

    Only one thread writes at a time: Linux lets one thread write to a file, and waiting threads
    keep a core busy (`i_rwsem`, a sixth of a merge's processor time).
    """

    def __init__(self, fd: int) -> None:
        self.fd, self.lock = fd, threading.Lock()

    def computed(self, _: TensorEntry, at: int, data: memoryview) -> None:
        with self.lock:
            write_at(self.fd, data, at)

    def copied(self, source: int, copy: Copy) -> None:
        with self.lock:
            copy_range(source, self.fd, *copy)


def write_shard(
    shard: OutputShard, plan: MergePlan, partial: Path, counted: BytesDone
) -> tuple[list[TensorReport], float]:
    """Write one output file under a temporary name, and wait until it is on the disk.

    Returns the reports of its computed tensors, and the seconds spent on waiting for the disk.
    """
    with partial.open("wb", buffering=0) as file:
        fd, copies = file.fileno(), shard.copies
        if shard.base is not None and shard.same_layout and clone(shard.base.path, fd):
            counted(sum(copy.n_bytes for copy in copies))
            copies = ()
        else:
            reserve_bytes(fd, shard.n_bytes)
            write_at(fd, shard.header.raw, 0)
        reports = work_through(shard, plan, copies, _Written(fd), counted)
        before = time.perf_counter()
        os.fsync(fd)
        return reports, time.perf_counter() - before


def check_unchanged(source: Shard) -> None:
    """Refuse a base that changed since the plan, by size and time."""
    try:
        stat = source.path.stat()
        same = (stat.st_size, stat.st_mtime_ns) == (source.header.size_bytes, source.mtime_ns)
        problem = "" if same else "it changed while it was being merged"
    except OSError as error:
        problem = f"it cannot be read any more ({error.strerror})"
    if problem:
        remedy = "Nothing was published; run again when nobody writes to the base"
        raise CheckpointError(f"read the base's '{source.name}'", problem, remedy)


@contextlib.contextmanager
def _open_sources(shard: OutputShard, base: Checkpoint) -> Iterator[dict[str, int]]:
    """Yield open descriptors of the base's shards that an output file needs, by name."""
    names = {job.source_shard for job in shard.jobs if job.source_shard is not None}
    names |= {shard.base.name} if shard.base is not None else set()
    with contextlib.ExitStack() as stack:
        sources = {}
        for name in sorted(names):
            check_unchanged(base.shards[name])
            sources[name] = stack.enter_context(base.shards[name].path.open("rb")).fileno()
        yield sources
        for name in sources:
            check_unchanged(base.shards[name])


def work_through(
    shard: OutputShard, plan: MergePlan, copies: Sequence[Copy], sink: Sink, counted: BytesDone
) -> list[TensorReport]:
    """Distribute spans and copies over threads; stop all at the first failure or Ctrl-C.

    Returns the reports of the computed tensors, in their order.
    """
    spans = [(span, Tally()) for job in shard.jobs for span in _spans_of(job)]
    pieces = [
        Copy(source + done, target + done, min(COPY_BYTES, n_bytes - done))
        for source, target, n_bytes in copies
        for done in range(0, n_bytes, COPY_BYTES)
    ]
    tasks: deque[tuple[_Span, Tally] | Copy] = deque([*spans, *pieces])

    @torch.inference_mode()  # the rows are views, which autograd would track
    def work(sources: dict[str, int]) -> None:
        room, readers = Room(), {name: RowReader(fd) for name, fd in sources.items()}
        while True:
            try:
                task = tasks.popleft()
            except IndexError:  # nothing is left
                return
            if isinstance(task, Copy):
                assert shard.base is not None
                sink.copied(sources[shard.base.name], task)
                counted(task.n_bytes)
            else:
                fold(*task, readers, room)

    def fold(span: _Span, tally: Tally, readers: dict[str, RowReader], room: Room) -> None:
        entries, done = shard.header.tensors, Counter({span.job.name: span.first_byte})
        folding = _Folding(span, readers.get(span.job.source_shard or ""), room, tally)
        for name, data in folding.pieces():
            if name in entries:  # else another file holds this part
                sink.computed(entries[name], entries[name].start + done[name], data)
                done[name] += len(data)
                counted(len(data))

    before, n_threads = torch.get_num_threads(), plan.options.n_threads
    torch.set_num_threads(1)  # each on one core: several share the work, and sums keep their order
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="merge")
    try:
        with _open_sources(shard, plan.base) as sources:
            try:
                futures = [pool.submit(work, sources) for _ in range(n_threads)]
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            finally:
                tasks.clear()
                pool.shutdown(wait=True)
    finally:
        torch.set_num_threads(before)
    tallies = {job.name: Tally() for job in shard.jobs}
    for span, tally in spans:  # in their order, whatever the threads did
        tallies[span.job.name] += tally
    return [job.report(tallies[job.name]) for job in shard.jobs]


# Rows -------------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """Some rows of one output tensor, with the terms and the gain that apply to them."""

    job: TensorJob
    n_cols: int
    start: int
    stop: int
    offset: int  # the row that the terms' matrix begins at
    terms: tuple[Patch, ...]
    gain: Gain | None

    @property
    def first_byte(self) -> int:
        """First byte of its rows in the tensor; a tensor that is quantized again is one span."""
        return self.start and self.start * self.n_cols * FLOATS[self.job.dtype].itemsize


def _spans_of(job: TensorJob) -> Iterator[_Span]:
    """Cut a tensor into spans: at the limits of its terms, and at `SPAN_ELEMENTS`."""
    n_rows, n_cols = job.matrix
    if not (job.placed or job.rows or job.packed):  # it is computed elementwise
        n_rows, n_cols = n_rows * n_cols, 1
    limits = {0, n_rows}
    for placed in job.placed:
        limits |= {placed.start, placed.stop}
    for first, last in itertools.pairwise(sorted(limits)):
        whole = _span_of(job, n_cols, first, last)
        step = _rows_of_a_task(whole)
        for start in range(first, last, step):
            yield whole._replace(start=start, stop=min(last, start + step))


def _span_of(job: TensorJob, n_cols: int, first: int, last: int) -> _Span:
    """Return the rows between two limits, with the updates that cover them."""
    covering = [p for p in job.placed if p.start <= first and last <= p.stop]
    terms = tuple(term for placed in covering for term in placed.terms)
    gains = [placed.gain for placed in covering if placed.gain is not None]
    return _Span(job, n_cols, first, last, first, terms, gains[0] if gains else None)


def _rows_of_a_task(span: _Span) -> int:
    """Return how many rows of a span one thread computes at once."""
    of_columns = span.gain is not None and any(term.spec.transposed for term in span.terms)
    if span.job.again or of_columns:  # scales, and norms of columns, are of many rows
        return span.stop - span.start
    return max(1, SPAN_ELEMENTS // max(1, span.n_cols))


class _Folding:
    """Computes the rows of a span block by block.

    `reader` reads the base's shard of the source; None without a source. If possible, computed rows
    overwrite the rows that were read, which halves the memory; otherwise they are in `room`.
    `tally` counts the part of the delta that is left after rounding.
    """

    def __init__(self, span: _Span, reader: RowReader | None, room: Room, tally: Tally) -> None:
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
        terms, gain = span.terms, span.gain
        self.values = None if job.packed is None else job.packed.rows()
        self.delta = Delta(terms, self.wide)
        if gain is not None:
            self.delta = gained = GainedDelta(terms, self.wide, gain)
            blocks = self._limits(1)
            gained.norms_of((a - span.offset, self.stored(a, b)) for a, b in blocks)

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
            before, written = stored(start, stop), made.rows()(0, len(wanted))
            tally.count(before, wanted - before, wanted - written)
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
            complete = merged.clone()
            _check_finite(job, self._with_rows(self.base(start, stop), start), complete)
            merged.copy_(complete)  # the base's rows may have been read into its place
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
    return tensor.detach().reshape(-1, n_cols)[start:stop]


def _kept_finite(rows: Tensor, merged: Tensor) -> bool:
    """Return whether a quick check shows that a cast made nothing infinite."""
    return merged.dtype == rows.dtype or math.isfinite(float(merged.sum(dtype=torch.float64)))


def _check_finite(job: TensorJob, rows: Tensor, merged: Tensor) -> None:
    """Check each value: -Inf of a mask may stay; a value that became Inf is an error."""
    finite, finite_before = torch.isfinite(merged), torch.isfinite(rows)
    if job.placed and not bool(finite_before.all()):
        problem, remedy = "the base holds NaN or Inf there", "The base is damaged; fetch it again"
        raise CheckpointError(f"merge into '{job.name}'", problem, remedy)
    if bool((finite_before & ~finite).any()):
        raise _too_large(job)


def _too_large(job: TensorJob) -> CheckpointError:
    problem = f"the result is too large for {job.dtype}: it would become Inf"
    remedy = 'Pass dtype="float32" or dtype="bfloat16", or merge with a smaller weight'
    return CheckpointError(f"merge into '{job.name}'", problem, remedy)
