"""Writing one output file: reserve, copy, compute, make durable, look at it again.

Everything is read from the base and nothing from the output, so that doing a file again
is always right: an update can never be added twice. The file grows under a temporary name that no
program loads, and gets its name only after it was read back.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch

from lora_inject.checkpoint.index import Checkpoint, Shard
from lora_inject.checkpoint.merge_plan import MergePlan
from lora_inject.checkpoint.output_files import Copy, OutputShard
from lora_inject.checkpoint.output_rows import (
    Memory,
    Span,
    combine,
    fold_span,
    spans_of,
)
from lora_inject.checkpoint.read import RowReader
from lora_inject.errors import CheckpointError
from lora_inject.functional import Tally, TensorReport
from lora_inject.storage.disk import (
    COPY_STEP_BYTES,
    clone,
    copy_range,
    open_read,
    open_write,
    reserve,
    write_at,
)
from lora_inject.storage.safetensors_file import read_header

TOLD_BYTES = 4 << 20
"""Progress is told in steps of so much; the blocks are many and small."""


@dataclass
class Timing:
    """Where the time went.

    Attributes:
        fsync_seconds: Waiting for the disk.
    """

    fsync_seconds: float = 0.0


@dataclass
class _Output:
    """One file being written, as the threads share it.

    Only one of them writes at a time: Linux lets no two write to one file, and those that it holds
    back burn a core while they wait (`i_rwsem`, a sixth of a merge's processor time).
    """

    shard: OutputShard
    fd: int
    sources: dict[str, int]
    counted: Callable[[int], None]
    on_disk: bool
    stop: threading.Event = field(default_factory=threading.Event)
    writing: threading.Lock = field(default_factory=threading.Lock)
    local: threading.local = field(default_factory=threading.local)

    def reader(self, source_shard: str) -> RowReader:
        """Return this thread's reader of one of the base's shards."""
        readers: dict[str, RowReader] = self.local.__dict__.setdefault("readers", {})
        if source_shard not in readers:
            readers[source_shard] = RowReader(self.sources[source_shard])
        return readers[source_shard]


def write_shard(
    shard: OutputShard,
    plan: MergePlan,
    partial: Path,
    workers: int,
    counted: Callable[[int], None],
    timing: Timing,
) -> list[TensorReport]:
    """Write one output file under a temporary name, durable and read back.

    Args:
        shard: What it holds.
        plan: The merge that it is of.
        partial: The temporary name.
        workers: How many threads compute.
        counted: Called from any thread with numbers of bytes done.
        timing: Where to add what was spent on waiting for the disk.

    Returns:
        The reports of its computed tensors, in their order.

    Raises:
        CheckpointError: A value is not finite, or the base changed.
        OSError: The disk is full, read-only or broken.
    """
    with contextlib.ExitStack() as stack:
        fd = open_write(partial)
        stack.callback(os.close, fd)
        sources = {}
        for source in _sources(shard, plan.base):
            check_unchanged(source)
            sources[source.name] = open_read(source.path)
            stack.callback(os.close, sources[source.name])
        output = _Output(shard, fd, sources, counted, plan.on_disk)
        copies = _prepare(output)
        reports = _run(output, copies, workers)
        before = time.perf_counter()
        os.fsync(fd)
        timing.fsync_seconds += time.perf_counter() - before
        for source in _sources(shard, plan.base):
            check_unchanged(source)
    _read_back(shard, partial)
    return reports


def _sources(shard: OutputShard, base: Checkpoint) -> list[Shard]:
    names = {job.source_shard for job in shard.jobs if job.source_shard is not None}
    if shard.base is not None:
        names.add(shard.base.name)
    return [base.shards[name] for name in sorted(names)]


def check_unchanged(source: Shard) -> None:
    """Refuse to go on with a base that is not the one that was planned.

    Raises:
        CheckpointError: Its size or time of change differ from what they were.
    """
    try:
        found = source.path.stat()
    except OSError as error:
        raise _changed(source, f"it cannot be read any more ({error.strerror})") from error
    if found.st_size != source.header.size_bytes or found.st_mtime_ns != source.mtime_ns:
        raise _changed(source, "it changed while it was being merged")


def _changed(source: Shard, found: str) -> CheckpointError:
    return CheckpointError(
        f"read the base's '{source.name}'",
        found,
        "Nothing was published; run again when nobody writes to the base",
    )


def _prepare(output: _Output) -> tuple[Copy, ...]:
    """Give the file its size and header; returns what remains to be copied."""
    shard = output.shard
    if shard.same_layout and shard.base is not None:
        os.ftruncate(output.fd, 0)
        if clone(output.sources[shard.base.name], output.fd):
            output.counted(sum(copy.n_bytes for copy in shard.copies))
            return ()
    reserve(output.fd, shard.header.size_bytes)
    write_at(output.fd, shard.header.raw, 0)
    return shard.copies


def _run(output: _Output, copies: Sequence[Copy], workers: int) -> list[TensorReport]:
    """Deal copies and spans to threads; stop all of them at the first failure or Ctrl-C."""
    spans = [list(spans_of(job)) for job in output.shard.jobs]
    tallies = [[Tally() for _ in of_job] for of_job in spans]
    pool = ThreadPoolExecutor(workers, thread_name_prefix="merge")
    futures: list[Future[None]] = []
    try:
        for i, of_job in enumerate(spans):
            for k, span in enumerate(of_job):
                futures.append(pool.submit(_fold, output, span, tallies[i], k))
        futures.extend(pool.submit(_copy, output, piece) for piece in _cut(copies))
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        output.stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    return [combine(job, of_job) for job, of_job in zip(output.shard.jobs, tallies, strict=True)]


def _cut(copies: Sequence[Copy]) -> Iterator[Copy]:
    for copy in copies:
        for done in range(0, copy.n_bytes, COPY_STEP_BYTES):
            n_bytes = min(COPY_STEP_BYTES, copy.n_bytes - done)
            yield Copy(copy.source_start + done, copy.target_start + done, n_bytes)


def _copy(output: _Output, copy: Copy) -> None:
    assert output.shard.base is not None
    source = output.sources[output.shard.base.name]

    def counted(n_bytes: int) -> None:
        output.counted(n_bytes)
        if output.stop.is_set():
            raise InterruptedError

    with output.writing:
        copy_range(source, output.fd, copy.source_start, copy.target_start, copy.n_bytes, counted)


@torch.inference_mode()  # the rows are views: autograd would keep account of each
def _fold(output: _Output, span: Span, tallies: list[Tally], k: int) -> None:
    job = span.job
    reader = None if job.source_shard is None else output.reader(job.source_shard)
    begin = output.shard.header.tensors[job.name].start
    memory: Memory = output.local.__dict__.setdefault("memory", Memory(output.on_disk))
    untold = 0
    for block in fold_span(span, reader, memory):
        if output.stop.is_set():
            return
        with output.writing:
            write_at(output.fd, block.data, begin + block.start * span.row_bytes)
        untold += len(block.data)
        if untold >= TOLD_BYTES:
            output.counted(untold)
            untold = 0
        tallies[k] = block.tally
    output.counted(untold)


def _read_back(shard: OutputShard, path: Path) -> None:
    """Open the finished file as a stranger would: our parser, then the reference library."""
    if read_header(path).raw != shard.header.raw:
        raise CheckpointError(
            f"read back '{shard.name}'",
            "its header is not what was written",
            "The disk or the memory is failing; nothing was published",
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"read back '{shard.name}'", f"safetensors refuses it ({error})", "Report this"
        ) from error
    if names != set(shard.header.tensors):
        raise CheckpointError(
            f"read back '{shard.name}'", "safetensors finds other tensors in it", "Report this"
        )


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Let each thread compute on one core: several share the work, and sums keep their order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)
