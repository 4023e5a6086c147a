"""Threads compute an output file, and write it durably or compare it with an existing one.

Everything is read from the base and nothing from the output. So writing a file again is always
right: no update can be added twice. Writing and verifying differ only in the sink, which takes each
piece of bytes.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

import torch

from lora_inject.checkpoint.index import Checkpoint, Shard
from lora_inject.checkpoint.merge_plan import MergePlan
from lora_inject.checkpoint.output_files import Copy, OutputShard
from lora_inject.checkpoint.output_rows import Folding, Span, spans_of
from lora_inject.errors import CheckpointError
from lora_inject.functional import Tally, TensorReport
from lora_inject.storage.disk import clone, copy_range, reserve, write_at
from lora_inject.storage.safetensors_file import TensorEntry
from lora_inject.storage.tensor_rows import Room, RowReader

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


def counted(sizes: Mapping[str, int], progress: Progress | None) -> Iterator[str]:
    """Yield each name, and report its bytes when the next one is asked for."""
    done = 0
    for name, size in sizes.items():
        yield name
        done += size
        if progress is not None:
            progress(done, sum(sizes.values()))


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
            reserve(fd, shard.n_bytes)
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
        found = "" if same else "it changed while it was being merged"
    except OSError as error:
        found = f"it cannot be read any more ({error.strerror})"
    if found:
        remedy = "Nothing was published; run again when nobody writes to the base"
        raise CheckpointError(f"read the base's '{source.name}'", found, remedy)


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
    spans = [(span, Tally()) for job in shard.jobs for span in spans_of(job)]
    pieces = [
        Copy(source + done, target + done, min(COPY_BYTES, n_bytes - done))
        for source, target, n_bytes in copies
        for done in range(0, n_bytes, COPY_BYTES)
    ]
    tasks: deque[tuple[Span, Tally] | Copy] = deque([*spans, *pieces])

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

    def fold(span: Span, tally: Tally, readers: dict[str, RowReader], room: Room) -> None:
        entries, done = shard.header.tensors, Counter({span.job.name: span.first_byte})
        folding = Folding(span, readers.get(span.job.source_shard or ""), room, tally)
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
