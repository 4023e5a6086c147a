"""Writing one output file: reserve, copy, compute, make durable, look at it again.

Everything is read from the base and nothing from the output, so that doing a file again is always
right: an update can never be added twice. The file grows under a temporary name that no program
loads, and gets its name only after it was read back.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import safetensors

from lora_inject.checkpoint.merge_plan import MergePlan
from lora_inject.checkpoint.output_files import Copy, OutputShard
from lora_inject.checkpoint.threads import Counted, work_through
from lora_inject.errors import CheckpointError
from lora_inject.functional import TensorReport
from lora_inject.storage.disk import clone, copy_range, open_write, reserve, write_at
from lora_inject.storage.safetensors_file import TensorEntry, read_header


@dataclass
class _Written:
    """The file being written.

    Only one thread writes at a time: Linux lets no two write to one file, and those that it holds
    back burn a core while they wait (`i_rwsem`, a sixth of a merge's processor time).
    """

    fd: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    def computed(self, _: TensorEntry, at: int, data: memoryview) -> None:
        with self.lock:
            write_at(self.fd, data, at)

    def copied(self, source: int, copy: Copy) -> None:
        with self.lock:
            copy_range(source, self.fd, *copy)


def write_shard(
    shard: OutputShard, plan: MergePlan, partial: Path, counted: Counted
) -> tuple[list[TensorReport], float]:
    """Write one output file under a temporary name, durable and read back.

    Returns the reports of its computed tensors, and the seconds spent on waiting for the disk.
    """
    fd, copies = open_write(partial), shard.copies
    try:
        os.ftruncate(fd, 0)
        if shard.base is not None and shard.same_layout and clone(shard.base.path, fd):
            counted(sum(copy.n_bytes for copy in copies))
            copies = ()
        else:
            reserve(fd, shard.n_bytes)
            write_at(fd, shard.header.raw, 0)
        reports = work_through(shard, plan, copies, _Written(fd), counted)
        before = time.perf_counter()
        os.fsync(fd)
        fsync_seconds = time.perf_counter() - before
    finally:
        os.close(fd)
    _read_back(shard, partial)
    return reports, fsync_seconds


def _read_back(shard: OutputShard, path: Path) -> None:
    """Open the finished file as a stranger would: our parser, then the reference library."""
    found, remedy = "", "Report this"
    if read_header(path).raw != shard.header.raw:
        found = "its header is not what was written"
        remedy = "The disk or the memory is failing; nothing was published"
    else:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                if set(file.keys()) != set(shard.header.tensors):
                    found = "safetensors finds other tensors in it"
        except safetensors.SafetensorError as error:
            found = f"safetensors refuses it ({error})"
    if found:
        raise CheckpointError(f"read back '{shard.name}'", found, remedy)
