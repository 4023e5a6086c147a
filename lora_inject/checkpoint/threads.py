"""One output file worked through by threads: spans computed from the base, and what stays as it is.

Writing and verifying differ only in what is done with each piece of bytes.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Protocol

import torch

from lora_inject.checkpoint.index import Checkpoint, Shard
from lora_inject.checkpoint.merge_plan import MergePlan
from lora_inject.checkpoint.output_files import FLOATS, Copy, OutputShard
from lora_inject.checkpoint.output_rows import Folding, Span, spans_of
from lora_inject.checkpoint.read import Room, RowReader
from lora_inject.errors import CheckpointError
from lora_inject.functional import Tally, TensorReport
from lora_inject.storage.disk import open_read
from lora_inject.storage.safetensors_file import TensorEntry

COPY_BYTES = 8 << 20
"""Longest single copy: limits the delay of progress reports and of Ctrl-C."""

Counted = Callable[[int], None]
"""Called from any thread with a number of bytes done."""


class Sink(Protocol):
    """What is done with the pieces of an output file, from any thread."""

    def computed(self, entry: TensorEntry, at: int, data: memoryview) -> None:
        """Take computed rows of a tensor, which belong at byte `at` of the file."""

    def copied(self, source: int, copy: Copy) -> None:
        """Take a range of bytes of the base's file that is open as `source`."""


class BytesDone:
    """Adds up bytes over threads, and reports the bytes done and the bytes in all."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self.progress = 0, total, progress
        self.lock = threading.Lock()

    def __call__(self, n_bytes: int) -> None:
        """Count some more."""
        with self.lock:
            self.done += n_bytes
            if self.progress is not None and n_bytes:
                self.progress(min(self.done, self.total), self.total)


def check_unchanged(source: Shard) -> None:
    """Refuse to go on with a base that is not the one that was planned, by size and time."""
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
    """Give descriptors of the base's shards that an output file is made of, by their names."""
    names = {job.source_shard for job in shard.jobs if job.source_shard is not None}
    names |= {shard.base.name} if shard.base is not None else set()
    with contextlib.ExitStack() as stack:
        sources = {}
        for name in sorted(names):
            check_unchanged(base.shards[name])
            sources[name] = open_read(base.shards[name].path)
            stack.callback(os.close, sources[name])
        yield sources
        for name in sources:
            check_unchanged(base.shards[name])


def work_through(
    shard: OutputShard, plan: MergePlan, copies: Sequence[Copy], sink: Sink, counted: Counted
) -> list[TensorReport]:
    """Distribute spans and copies over threads; stop all at the first failure or Ctrl-C.

    Returns the reports of the computed tensors, in their order.
    """
    spans = [(span, Tally()) for job in shard.jobs for span in spans_of(job)]
    tasks: deque[tuple[Span, Tally] | Copy] = deque([*spans, *_pieces(copies)])

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
        entry = shard.header.tensors[span.job.name]
        reader = readers.get(span.job.source_shard or "")
        row_bytes = span.n_cols * FLOATS[span.job.dtype].itemsize
        for start, data in Folding(span, reader, room, tally).blocks():
            sink.computed(entry, entry.start + start * row_bytes, data)
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
    return _reports(shard, spans)


def _pieces(copies: Sequence[Copy]) -> list[Copy]:
    """Cut copies into pieces of at most `COPY_BYTES`."""
    return [
        Copy(source + done, target + done, min(COPY_BYTES, n_bytes - done))
        for source, target, n_bytes in copies
        for done in range(0, n_bytes, COPY_BYTES)
    ]


def _reports(shard: OutputShard, spans: Sequence[tuple[Span, Tally]]) -> list[TensorReport]:
    """Return a report for each tensor, with the sum of its spans' tallies in their order."""
    tallies = {job.name: Tally() for job in shard.jobs}
    for span, tally in spans:
        tallies[span.job.name] += tally
    return [
        TensorReport(
            job.name,
            job.action,
            str(FLOATS[job.dtype]).removeprefix("torch."),
            job.shape,
            job.sites,
        ).counted(tallies[job.name])
        for job in shard.jobs
    ]
