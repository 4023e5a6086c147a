"""One output file worked through by threads: spans computed from the base, and what stays as it is.

Writing and verifying differ only in what is done with each piece, so both hand in a `Sink`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Protocol

import torch

from lora_inject.checkpoint.index import Checkpoint, Shard
from lora_inject.checkpoint.merge_plan import MergePlan
from lora_inject.checkpoint.output_files import FLOATS, Copy, OutputShard
from lora_inject.checkpoint.output_rows import Block, Span, fold_span, spans_of
from lora_inject.checkpoint.read import Room, RowReader
from lora_inject.errors import CheckpointError
from lora_inject.functional import Tally, TensorReport
from lora_inject.storage.disk import COPY_STEP_BYTES, open_read

TOLD_BYTES = 4 << 20
"""Progress is told in steps of so much; the blocks are many and small."""

Counted = Callable[[int], None]
"""Called from any thread with a number of bytes done."""


class Sink(Protocol):
    """What is done with the pieces of an output file, from any thread."""

    def computed(self, span: Span, block: Block) -> None:
        """Take some computed rows."""

    def copied(self, source: int, copy: Copy, counted: Counted) -> None:
        """Take a range of bytes of the base's file that is open as `source`."""


class Counter:
    """Adds up bytes over threads, and tells whoever asked the bytes done and the bytes in all."""

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
def open_sources(shard: OutputShard, base: Checkpoint) -> Iterator[dict[str, int]]:
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
    shard: OutputShard,
    plan: MergePlan,
    sources: Mapping[str, int],
    copies: Sequence[Copy],
    sink: Sink,
    counted: Counted,
) -> list[TensorReport]:
    """Deal copies and spans to threads; stop all of them at the first failure or Ctrl-C.

    Returns the reports of the computed tensors, in their order: what was counted in a tensor's
    spans is summed in the order of the spans.
    """
    work = _Work(shard, sources, sink, counted)
    spans = [(span, Tally()) for job in shard.jobs for span in spans_of(job)]
    pieces = [
        Copy(source + done, target + done, min(COPY_STEP_BYTES, n_bytes - done))
        for source, target, n_bytes in copies
        for done in range(0, n_bytes, COPY_STEP_BYTES)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # each on one core: several share the work, and sums keep their order
    pool = ThreadPoolExecutor(plan.options.n_threads, thread_name_prefix="merge")
    try:
        futures = [pool.submit(work.fold, span, tally) for span, tally in spans]
        futures += [pool.submit(work.copy, piece) for piece in pieces]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
    finally:
        work.stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)
    tallies: dict[str, Tally] = {}
    for span, tally in spans:
        tallies[span.job.name] = tallies.get(span.job.name, Tally()) + tally
    return [
        TensorReport(
            job.name,
            job.action,
            str(FLOATS[job.dtype]).removeprefix("torch."),
            job.shape,
            job.sites,
        ).counted(tallies.get(job.name))
        for job in shard.jobs
    ]


class _Work:
    """One file being worked on, as the threads share it."""

    def __init__(
        self,
        shard: OutputShard,
        sources: Mapping[str, int],
        sink: Sink,
        counted: Counted,
    ) -> None:
        self.shard, self.sources, self.sink, self.counted = shard, sources, sink, counted
        self.stop = threading.Event()
        self.local = threading.local()

    def _reader(self, source_shard: str | None) -> RowReader | None:
        """Return this thread's reader of one of the base's shards."""
        if source_shard is None:
            return None
        readers: dict[str, RowReader] = self.local.__dict__.setdefault("readers", {})
        if source_shard not in readers:
            readers[source_shard] = RowReader(self.sources[source_shard])
        return readers[source_shard]

    @torch.inference_mode()  # the rows are views: autograd would keep account of each
    def fold(self, span: Span, tally: Tally) -> None:
        """Compute one span."""
        room: Room = self.local.__dict__.setdefault("room", Room())
        untold = 0
        for block in fold_span(span, self._reader(span.job.source_shard), room, tally):
            if self.stop.is_set():
                return
            self.sink.computed(span, block)
            untold += len(block.data)
            if untold >= TOLD_BYTES:
                self.counted(untold)
                untold = 0
        self.counted(untold)

    def copy(self, copy: Copy) -> None:
        """Hand on one range of the base's bytes."""

        def counted(n_bytes: int) -> None:
            self.counted(n_bytes)
            if self.stop.is_set():
                raise InterruptedError

        assert self.shard.base is not None
        self.sink.copied(self.sources[self.shard.base.name], copy, counted)
