"""Folding adapters into a checkpoint on disk: the verb.

Plan, then write every shard under a temporary name, then publish. Nothing is visible
before all of it is right, and every failure leaves either nothing or a merge that can go on.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_inject.checkpoint import verify as verification
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.journal import Staging, check_output, check_space
from lora_inject.checkpoint.merge_plan import MergePlan, plan_merge
from lora_inject.checkpoint.options import MergeOptions
from lora_inject.checkpoint.output_files import OutputShard
from lora_inject.checkpoint.parts import Part, digest
from lora_inject.checkpoint.ranks import Ranks
from lora_inject.checkpoint.side_files import read_side_file
from lora_inject.checkpoint.write import Timing, check_unchanged, one_thread_each, write_shard
from lora_inject.errors import CheckpointError
from lora_inject.functional import MergeReport, TensorReport
from lora_inject.version import __version__

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all; from any thread, one call at a time."""

_DISK_REMEDIES = {
    errno.ENOSPC: "Free some space and run again",
    errno.EDQUOT: "Your quota is used up; free some space and run again",
    errno.EACCES: "Give a folder that you may write to",
    errno.EPERM: "Give a folder that you may write to",
    errno.EROFS: "Give a folder on a disk that is not read-only",
}


def merge_checkpoint(
    base: str | Path | Checkpoint,
    parts: Sequence[Part],
    output: str | Path,
    options: MergeOptions | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> MergeReport:
    """Fold adapters into a safetensors checkpoint, without building the model.

    Memory does not grow with the model: row blocks are read, updated in float32, rounded once and
    written. Tensors that no adapter touches keep their bytes. Killed at any moment, the output is
    absent, resumable by the same call, or complete.

    Args:
        base: Folder of the base.
        parts: The adapters, each with its weight.
        output: Folder to make; it must not exist, be empty, or hold the unfinished same merge.
        options: How; the defaults where None.
        progress: Called as bytes are done.
        ranks: This process among several that share the merge; from the environment where None.

    Returns:
        What was done, per tensor.

    Raises:
        CheckpointError: Anything that is wrong with the base, the adapters, the disk or the result.
    """
    plan = plan_merge(base, parts, options)
    return merge_planned(plan, output, progress, ranks)


def merge_planned(
    plan: MergePlan,
    output: str | Path,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> MergeReport:
    """Carry out a plan; see `merge_checkpoint`.

    Args:
        plan: From `plan_merge`.
        output: Folder to make.
        progress: Called as bytes are done.
        ranks: This process among several.

    Raises:
        CheckpointError: As `merge_checkpoint`.
    """
    began = time.perf_counter()
    ranks = ranks or Ranks.from_environment()
    folder = check_output(plan.base, Path(output))
    with _disk_errors(folder):
        run = _Run(plan, folder, ranks, progress)
        return run.all(began)


class _Run:
    """One process's work on one merge."""

    def __init__(
        self, plan: MergePlan, folder: Path, ranks: Ranks, progress: Progress | None
    ) -> None:
        self.plan, self.ranks = plan, ranks
        self.staging = Staging(folder)
        sizes = [(shard.name, shard.header.size_bytes) for shard in plan.shards]
        share = set(ranks.mine(sizes))
        self.mine = [shard for shard in plan.shards if shard.name in share]
        self.counter = _Counter(sum(s.data_bytes for s in self.mine), progress)
        self.timing = Timing()
        self.records: dict[str, list[TensorReport]] = {}
        self.resumed: list[str] = []

    def all(self, began: float) -> MergeReport:
        """Do this rank's shards, and publish if they were the last."""
        identity = _identity(self.plan)
        staging = self.staging
        with staging.opened(identity, shared=self.ranks.world > 1), self._tidy():
            self._find_finished()
            todo = [shard for shard in self.mine if shard.name not in self.records]
            check_space(staging.output, sum(shard.header.size_bytes for shard in todo))
            if self.plan.options.verify:
                staging.agree_on_base(_base_digests(self.plan))
            self.counter.add(sum(s.data_bytes for s in self.mine if s.name in self.records))
            self.resumed = list(self.records)
            for shard in todo:
                self._write(shard)
            complete = self._publish()
        tensors = [tensor for s in self.plan.shards for tensor in self.records.get(s.name, ())]
        return MergeReport(
            adapters=tuple((part.label, part.weight) for part in self.plan.parts),
            tensors={tensor.name: tensor for tensor in tensors},
            n_tensors=sum(len(shard.header.tensors) for shard in self.plan.shards),
            lost=tuple(self._lost()),
            notes=self.plan.notes,
            output=staging.output,
            n_bytes=self.plan.n_bytes,
            resumed=tuple(self.resumed),
            verified=self.plan.options.verify and complete,
            seconds=time.perf_counter() - began,
            fsync_seconds=self.timing.fsync_seconds,
            peak_memory_bytes=peak_memory_bytes(),
        )

    def _find_finished(self) -> None:
        """Read the records of finished shards, whoever finished them."""
        for shard in self.plan.shards:
            record = self.staging.record(shard.name, shard.header)
            if record is not None:
                self.records[shard.name] = [TensorReport.from_dict(t) for t in record["tensors"]]

    def _write(self, shard: OutputShard) -> None:
        staging, options = self.staging, self.plan.options
        workers = options.workers or min(4, os.cpu_count() or 1)
        partial = staging.partial(shard.name)
        try:
            with one_thread_each():
                tensors = write_shard(
                    shard,
                    self.plan.base,
                    partial,
                    workers,
                    self.counter.add,
                    self.timing,
                )
        except BaseException:
            staging.discard(shard.name)
            raise
        self.records[shard.name] = tensors
        self._check_kept()
        staging.finish(shard.name, {"tensors": [tensor.to_dict() for tensor in tensors]})

    def _lost(self) -> list[str]:
        least = self.plan.options.min_kept
        if least is None:
            return []
        return [
            tensor.name
            for tensors in self.records.values()
            for tensor in tensors
            if tensor.kept is not None and tensor.kept < least
        ]

    def _check_kept(self) -> None:
        lost = self._lost()
        if not lost or self.plan.options.on_lost == "warn":
            return
        kept = {t.name: t.kept for tensors in self.records.values() for t in tensors}
        worst = sorted(lost, key=lambda name: kept[name] or 0.0)[:5]
        raise _LostError(
            f"keep at least {self.plan.options.min_kept} of every delta",
            f"rounding leaves less in {len(lost)} tensors: "
            + ", ".join(f"'{name}' {kept[name]:.3f}" for name in worst),
            "Write float32 (dtype), keep the adapter unmerged, or accept less (min_kept)",
        )

    def _publish(self) -> bool:
        """Make the output visible if every shard is finished; False where some are not."""
        plan, staging = self.plan, self.staging
        self._find_finished()
        if any(shard.name not in self.records for shard in plan.shards):
            return False
        self._check_kept()
        for source in plan.base.shards.values():
            check_unchanged(source)
        with staging.turn() as mine:
            if not mine:
                return False
            if plan.options.verify:
                verification.verify_shards(plan, _places(staging, plan)).check()
            staging.publish([shard.name for shard in plan.shards], _files(plan))
        return True

    @contextlib.contextmanager
    def _tidy(self) -> Iterator[None]:
        """Leave nothing behind after a failure that nothing can be resumed from."""
        try:
            yield
        except BaseException as error:
            hopeless = isinstance(error, _LostError) or self.staging.n_finished() == 0
            if hopeless and self.ranks.world == 1:
                self.staging.abandon()
            raise


class _LostError(CheckpointError):
    """Rounding left too little of a delta."""


class _Counter:
    """Counts bytes over threads and tells whoever asked."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress
        self.lock = threading.Lock()

    def add(self, n_bytes: int) -> None:
        """Count some more."""
        with self.lock:
            self.done += n_bytes
            if self.progress is not None and n_bytes:
                self.progress(min(self.done, self.total), self.total)


def _places(staging: Staging, plan: MergePlan) -> dict[str, Path]:
    """Return where each finished shard lies at the moment."""
    places = {}
    for shard in plan.shards:
        waiting = staging.staged(shard.name)
        places[shard.name] = waiting if waiting.exists() else staging.output / shard.name
    return places


def _files(plan: MergePlan) -> dict[str, bytes]:
    """Return the content of every file but the shards; the index and the config come last."""
    base = plan.base
    files = {name: read_side_file(base.folder, name) for name in plan.side_files}
    if base.index_name is not None:
        index = plan.index
        files[base.index_name] = index or read_side_file(base.folder, base.index_name)
    if base.config:
        files["config.json"] = plan.config or read_side_file(base.folder, "config.json")
    return files


def _identity(plan: MergePlan) -> dict[str, Any]:
    """Return what a rerun must agree with."""
    return {
        "format": 1,
        "tool": f"lora_inject {__version__}",
        "plan": plan.digest,
        "options": plan.options.identity,
        "adapters": [digest(part) for part in plan.parts],
        "base": {
            shard.name: {
                "bytes": shard.header.size_bytes,
                "mtime_ns": shard.mtime_ns,
                "header": shard.header.digest,
            }
            for shard in plan.base.shards.values()
        },
    }


def _base_digests(plan: MergePlan) -> dict[str, str]:
    """Return the SHA-256 of every file of the base that is read."""
    digests = {}
    for shard in plan.base.shards.values():
        with shard.path.open("rb") as file:
            digests[shard.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def peak_memory_bytes() -> int | None:
    """Return the most memory that this process ever held, None where the system does not say."""
    # Not getrusage on Linux: it starts from what the process held that started this one.
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the system says about the disk into one clear error."""
    try:
        yield
    except OSError as error:
        remedy = _DISK_REMEDIES.get(error.errno or 0, "Check the disk and run again")
        unfinished = Staging(folder)
        if unfinished.folder.exists():
            remedy += f"; {unfinished.n_finished()} finished shards are kept in '{folder}'"
        raise CheckpointError(
            f"write to '{folder}'", error.strerror or str(error), remedy
        ) from error
