"""An output file as one stream of pieces, in the order of the file.

A piece is copied from the base or computed; a merge writes the pieces, and verifying compares them.
Everything is read from the base and nothing from the output. So writing a file again is always
right: no update can be added twice.

Every output row depends only on the same row of the base and on small factors. So threads compute
blocks of rows ahead of the one that writes, and memory does not grow with a tensor. The arithmetic
is that of `functional.fold`: float32 (float64 for float64), with one rounding at the end
for any number of adapters.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from lora_inject.checkpoint.index import Checkpoint, Shard
from lora_inject.checkpoint.merge_plan import MergePlan
from lora_inject.checkpoint.output_files import OutputShard, TensorJob
from lora_inject.checkpoint.packed import Packed, rows_in_memory
from lora_inject.core.files.row_reader import Room, RowReader, rows_per_block
from lora_inject.core.files.safetensors_file import FLOATS, TensorEntry
from lora_inject.core.files.tensors import bytes_of
from lora_inject.core.functional.fold import Delta, Tally, fold_rows, mix_copies
from lora_inject.core.functional.merge_report import TensorReport
from lora_inject.errors import CheckpointError

COPY_BYTES = 8 << 20
"""Longest single copy: limits the delay of progress reports and of Ctrl-C."""
BLOCKS_AHEAD = 2
"""Blocks that each thread may compute before they are asked for."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class BytesDone:
    """Adds up bytes, and reports the bytes done and the bytes in all."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def __call__(self, n_bytes: int) -> None:
        """Count some more."""
        self.done += n_bytes
        if self.progress is not None and n_bytes:
            self.progress(min(self.done, self.total), self.total)


def counting_bytes(sizes: Mapping[str, int], progress: Progress | None) -> Iterator[str]:
    """Yield each name, and report its bytes when the next one is asked for."""
    done = BytesDone(sum(sizes.values()), progress)
    for name, size in sizes.items():
        yield name
        done(size)


class Piece(NamedTuple):
    """Some bytes of an output file, from byte `at` on.

    They are `data`, computed for the tensor `name` and valid until the next piece; or those of
    `source` from byte `start` on.
    """

    at: int
    n_bytes: int
    name: str = ""
    data: memoryview = memoryview(b"")
    source: RowReader | None = None
    start: int = 0


Reports = dict[str, TensorReport]
"""Of the computed tensors of an output file, by name."""


@contextlib.contextmanager
def stream(shard: OutputShard, plan: MergePlan) -> Iterator[tuple[Iterator[Piece], Reports]]:
    """Give every byte of an output file but its header, piece by piece; at most once.

    The reports are filled in with the last piece. Threads stop when the block is left, at a failure
    or by Ctrl-C too.
    """
    n_threads, reports = plan.options.n_threads, Reports()
    with _on_one_core_each(), _open_sources(shard, plan.base) as sources:
        pool = ThreadPoolExecutor(n_threads, thread_name_prefix="merge")
        try:
            yield _pieces(shard, sources, pool, BLOCKS_AHEAD * n_threads, reports), reports
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_SHARED = threading.Lock()
_N_THREADS: list[int] = []  # of torch, as each stream that is open now found them


@contextlib.contextmanager
def _on_one_core_each() -> Iterator[None]:
    """Let each thread compute on one core: several share the work, and sums keep their order.

    torch's number of threads is the process's, and others compute on one core meanwhile, too. Of
    several merges at once the first knows what it was.
    """
    with _SHARED:
        _N_THREADS.append(_N_THREADS[0] if _N_THREADS else torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _SHARED:
            torch.set_num_threads(_N_THREADS.pop())


def _pieces(
    shard: OutputShard,
    sources: Mapping[str, RowReader],
    pool: ThreadPoolExecutor,
    ahead: int,
    reports: Reports,
) -> Iterator[Piece]:
    """Yield the pieces in their order, with at most so many blocks computed ahead."""
    tallies = {job.name: Tally() for job in shard.jobs}
    next_byte = {entry.name: entry.start for entry in shard.header.tensors.values()}
    tasks, waiting = _tasks(shard, sources), deque[Piece | tuple[_Task, Room, Future[_Block]]]()
    free = [Room() for _ in range(ahead)]
    while True:
        while free and (task := next(tasks, None)) is not None:
            if isinstance(task, Piece):
                waiting.append(task)
            else:
                rows, start, stop = task
                room = free.pop()
                waiting.append((task, room, pool.submit(rows.block, start, stop, room)))
        if not waiting:
            break
        first = waiting.popleft()
        if isinstance(first, Piece):
            yield first
            continue
        (rows, _, _), room, made = first
        parts, tally = made.result()
        tallies[rows.job.name].add(tally)
        for name, data in parts:
            if name in next_byte:  # else another file holds this part
                yield Piece(next_byte[name], len(data), name, data)
                next_byte[name] += len(data)
        free.append(room)
    reports |= {job.name: job.report(tallies[job.name]) for job in shard.jobs}


def _tasks(shard: OutputShard, sources: Mapping[str, RowReader]) -> Iterator[Piece | _Task]:
    """Yield what is to be copied, and the blocks to be computed, in the order of the file."""
    for part in shard.content:
        if isinstance(part, TensorEntry):
            at, base = shard.header.tensors[part.name].start, sources[shard.base.name]
            for done in range(0, part.n_bytes, COPY_BYTES):
                n_bytes = min(COPY_BYTES, part.n_bytes - done)
                yield Piece(at + done, n_bytes, source=base, start=part.start + done)
        else:
            rows = _Rows(part, sources.get(part.shard or ""))
            yield from ((rows, start, stop) for start, stop in rows.limits())


@contextlib.contextmanager
def _open_sources(shard: OutputShard, base: Checkpoint) -> Iterator[dict[str, RowReader]]:
    """Open the base's files that an output file needs, by name."""
    names = {shard.base.name, *(job.shard for job in shard.jobs if job.shard)}
    with contextlib.ExitStack() as stack:  # in a finalizer Ctrl-C would be lost
        sources = {}
        for name in sorted(names):
            check_unchanged(base.shards[name])
            sources[name] = RowReader(base.shards[name].path)
            stack.callback(sources[name].close)
        yield sources
        for name in names:
            check_unchanged(base.shards[name])


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


# Rows -------------------------------------------------------------------------------------------

_Block = tuple[list[tuple[str, memoryview]], Tally]
"""Bytes by the names of tensors, and how much of the delta is left after rounding."""


_OF_THREAD = threading.local()


def _memory_of_thread() -> Room:
    """Return memory for the arithmetic of one block after the other.

    The system may take pieces of this size back when they are freed, and give them out anew page by
    page: forced to, a merge of 1.3 GB had 367,000 page faults, and 73,000 with memory that stays.
    """
    room: Room = _OF_THREAD.__dict__.setdefault("room", Room())
    return room


class _Rows:
    """The rows of one output tensor.

    Args:
        job: The tensor.
        source: The base's file that holds what it is made from, if there is one.
    """

    def __init__(self, job: TensorJob, source: RowReader | None) -> None:
        self.job, self.source = job, source
        self.n_rows, self.n_cols = job.matrix
        is_double = job.source is not None and job.source.dtype == "F64"
        self.wide = torch.float64 if is_double else torch.float32
        self.values = None if job.packed is None else job.packed.rows()
        terms = [term for placed in job.placed for term in placed.terms]
        gain = next((placed.gain for placed in job.placed if placed.gain is not None), None)
        self.delta = Delta(terms, self.wide, gain) if terms else None
        if self.delta is not None:
            self.delta.norms_of((start, self.stored(start, stop)) for start, stop in self.limits())

    def limits(self) -> Iterator[tuple[int, int]]:
        """Yield the first row of each block, and the row after its last."""
        unit = self.job.packed.unit if self.job.packed is not None and self.job.again else 1
        step = max(unit, rows_per_block(self.n_cols) // unit * unit)
        for start in range(0, self.n_rows, step):
            yield start, min(self.n_rows, start + step)

    @torch.inference_mode()  # the rows are views, which autograd would track
    def block(self, start: int, stop: int, room: Room) -> _Block:
        """Compute some rows; the bytes are in `room`."""
        merged, tally = self.merged(start, stop, room)
        if self.job.packed is not None and self.job.again:
            return self._encoded(self.job.packed, start, merged)
        return [(self.job.name, room.data)], tally

    def merged(self, start: int, stop: int, room: Room) -> tuple[Tensor, Tally]:
        """Return some rows in the dtype of the output, or float32 if they are quantized again."""
        job, tally = self.job, Tally()
        same = job.source is not None and job.source.dtype == job.dtype
        # What is read is overwritten where it lies, if its bytes are of one size with the result's.
        rows = self._with_rows(self.base(start, stop, room if same else None), start)
        merged = room.rows(FLOATS.get(job.dtype, torch.float32), stop - start, self.n_cols)
        if self.delta is None:
            merged.copy_(rows)
        else:
            fold_rows(rows, start, self.delta, tally, merged, _memory_of_thread().rows)
        if not (tally.finite if self.delta is not None else _kept_finite(rows, merged)):
            _check_finite(job, self._with_rows(self.base(start, stop, Room()), start), merged)
        return merged, tally

    def _encoded(self, packed: Packed, start: int, wanted: Tensor) -> _Block:
        """Return the parts of rows that are quantized again, and count what that keeps."""
        tally = Tally()  # of what is written: not of rounding to float32
        parts = packed.encoded(wanted)
        before = self.stored(start, start + len(wanted))
        written = packed.values(rows_in_memory(parts), 0, len(wanted))
        tally.count(before, wanted - before, wanted - written)
        if not tally.finite:
            raise _too_large(self.job)
        data = [(packed.parts[role].name, memoryview(bytes_of(p))) for role, p in parts.items()]
        return data, tally

    def base(self, start: int, stop: int, room: Room | None = None) -> Tensor:
        """Return what the deltas are added to: `W + sum of w (T - W) + sum of w b`.

        Exactly T for one adapter of weight 1.
        """
        job, rows = self.job, self.stored(start, stop, room)
        if not (job.trained or job.added):
            return rows
        dtypes = {rows.dtype, *(t.dtype for t, _ in job.trained)}
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        copies = [(self._of(t, start, stop), weight) for t, weight in job.trained]
        total = mix_copies(rows, copies, wide)
        for tensor, weight in job.added:
            total += weight * self._of(tensor, start, stop).to(wide)
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

    def stored(self, start: int, stop: int, room: Room | None = None) -> Tensor:
        """Return W, from the base, or from an adapter that holds it; valid until the next call.

        What is read is in `room`, or in memory of the thread.
        """
        job = self.job
        if job.held is not None:
            return self._of(job.held, start, stop)
        if self.values is not None:
            return self.values(start, stop)
        assert job.source is not None
        assert self.source is not None
        return self.source.rows(job.source, self.n_cols, start, stop, room)

    def _of(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        return tensor.detach().reshape(-1, self.n_cols)[start:stop]


_Task = tuple[_Rows, int, int]


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
