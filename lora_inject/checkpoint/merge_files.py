"""Merge adapters into a checkpoint on disk: plan, write each weight file, publish in one step.

Weight files and side files are written to `files` in a folder next to the output, which gets the
output's name in one rename when all of them are complete. So a process that dies leaves no output,
and a later run can continue with its finished files: `manifest.json` identifies the merge, and each
finished weight file has a separate record, so several processes never write one file.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import distributed

from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.merge_inputs import Given, MergeOptions, digest
from lora_inject.checkpoint.merge_plan import MergedFiles, MergePlan, plan_merge, tensor_report
from lora_inject.checkpoint.output_files import OutputShard, header_digest
from lora_inject.checkpoint.verify import verify_shards
from lora_inject.checkpoint.write import BytesDone, Progress, check_unchanged, write_shard
from lora_inject.core.files.atomic import (
    fsync_dir,
    out_of_the_way,
    remedy_for,
    rename_folder,
    replace_file,
    write_new,
)
from lora_inject.core.files.safetensors_file import read_header
from lora_inject.core.files.strict_json import read_json
from lora_inject.core.functional.merge_report import TensorReport
from lora_inject.errors import CheckpointError, user_path
from lora_inject.version import __version__

SPARE_BYTES = 64 << 20
"""Left free for small files and the file system's own needs."""


def merge_checkpoint(
    base: str | Path | Checkpoint,
    adapters: Sequence[Given],
    output: str | Path,
    *,
    options: MergeOptions | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> MergedFiles:
    """Fold adapters into a safetensors checkpoint, without building the model.

    Memory does not grow with the model: row blocks are read, updated in float32, rounded once and
    written. Tensors that no adapter changes keep their bytes. If the process is killed, the output
    is absent or complete, and the same call continues with the finished files. The processes of
    torchrun share the work.

    Args:
        base: Folder of the base, or one `.safetensors` file.
        adapters: Paths of adapters, adapters as values, or `WeightedAdapter`s.
        output: Folder to create; it must not exist, or must be empty.
        options: Options of the merge; None for the defaults.
        progress: Called with bytes done and bytes in all.
        overwrite: Replace a checkpoint that is there, once the new one is complete.

    Returns:
        A report for each tensor.

    Raises:
        CheckpointError: Something is wrong with the base, the adapters, the disk or the result.
        FormatError: An adapter's files cannot be read correctly.

    Examples:
        >>> import tempfile, torch, lora_inject as li
        >>> from safetensors.torch import load_file, save_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> (folder / "base").mkdir()
        >>> save_file(net.state_dict(), folder / "base" / "model.safetensors")
        >>> _ = li.inject(net, {"rank": 1, "alpha": 1, "targets": ["0"]})
        >>> with torch.no_grad():
        ...     for parameter in li.adapter_parameters(net).values():
        ...         _ = parameter.fill_(0.5)
        >>> state = li.adapter_state(net)
        >>> report = merge_checkpoint(folder / "base", [state], folder / "merged")
        >>> round(report.tensors["0.weight"].kept, 3)
        1.0
        >>> merged = load_file(folder / "merged" / "model.safetensors")["0.weight"]
        >>> torch.allclose(merged, net[0]._parameters["weight"] + 0.25)
        True
    """
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    check_output(checkpoint, output, overwrite=overwrite)
    planned = plan_merge(checkpoint, adapters, options)
    return merge_planned(planned, output, progress, overwrite=overwrite)


def merge_planned(
    plan: MergePlan,
    output: str | Path,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
) -> MergedFiles:
    """Carry out what `plan_merge` planned; the rest as for `merge_checkpoint`."""
    began = time.perf_counter()
    folder = check_output(plan.base, output, overwrite=overwrite)
    return _Run(plan, Staging(folder, overwrite=overwrite), progress).all(began)


class _Run:
    """One process's work on one merge."""

    def __init__(self, plan: MergePlan, staging: Staging, progress: Progress | None) -> None:
        self.plan = plan
        self.processes = _Processes()
        self.staging = staging
        self.mine = plan.shards[self.processes.rank :: self.processes.world]
        self.counted = BytesDone(sum(s.data_bytes for s in self.mine), progress)
        self.fsync_seconds = 0.0
        self.records: dict[str, list[TensorReport]] = {}

    def all(self, began: float) -> MergedFiles:
        """Do this process's share, wait for the others, and publish."""
        first = self.processes.rank == 0
        with self._tidy():
            with self.processes.together():
                if first:
                    self.staging.open(_identity(self.plan))
            with self.processes.together():
                resumed = self._write_share()
            self._find_finished()
            with self.processes.together():
                self._check_kept()
                if first:
                    self._publish()
        return self._report(resumed, began)

    def _write_share(self) -> tuple[str, ...]:
        """Write this process's files; return those that an earlier run had finished."""
        self._find_finished()
        resumed = tuple(self.records)
        todo = [shard for shard in self.mine if shard.name not in self.records]
        _check_space(self.staging.output, sum(shard.n_bytes for shard in todo))
        self.counted(sum(shard.data_bytes for shard in self.mine if shard not in todo))
        for shard in todo:
            self._write(shard)
        return resumed

    def _report(self, resumed: tuple[str, ...], began: float) -> MergedFiles:
        tensors = [tensor for shard in self.plan.shards for tensor in self.records[shard.name]]
        return MergedFiles(
            adapters=tuple((adapter.label, adapter.weight) for adapter in self.plan.adapters),
            tensors={tensor.name: tensor for tensor in tensors},
            n_tensors=sum(len(shard.header.tensors) for shard in self.plan.shards),
            notes=self.plan.notes,
            output=self.staging.output,
            n_bytes=self.plan.n_bytes,
            resumed=resumed,
            verified=self.plan.options.verify,
            seconds=time.perf_counter() - began,
            fsync_seconds=self.fsync_seconds,
            peak_memory_bytes=_peak_memory_bytes(),
        )

    def _find_finished(self) -> None:
        """Read the records of finished files, of all processes."""
        for shard in self.plan.shards:
            if (record := self.staging.record(shard)) is not None:
                self.records[shard.name] = [tensor_report(t) for t in record["tensors"]]

    def _write(self, shard: OutputShard) -> None:
        partial = self.staging.partial()
        try:
            tensors, seconds = write_shard(shard, self.plan, partial, self.counted)
            self.fsync_seconds += seconds
            self.records[shard.name] = tensors
            self._check_kept()
            self.staging.finish(partial, shard, {"tensors": [t.to_dict() for t in tensors]})
        finally:
            partial.unlink(missing_ok=True)

    def _check_kept(self) -> None:
        least = self.plan.options.min_kept
        if least is None:
            return
        tensors = [tensor for tensors in self.records.values() for tensor in tensors]
        lost = sorted((t.kept, t.name) for t in tensors if t.kept is not None and t.kept < least)
        if lost:
            worst = ", ".join(f"'{name}' {kept!r}" for kept, name in lost[:5])
            problem = f"rounding leaves less in {len(lost)} tensors: {worst}"
            wide = "floats (--dequantize)" if self.plan.options.requantize else "float32 (--dtype)"
            remedy = f"Write {wide}, keep the adapter unmerged, or accept less (--min-kept)"
            raise _LostError(f"keep at least {least} of every delta", problem, remedy)

    def _publish(self) -> None:
        for source in self.plan.base.shards.values():
            check_unchanged(source)
        if self.plan.options.verify:
            places = {shard.name: self.staging.files / shard.name for shard in self.plan.shards}
            verify_shards(self.plan, places).check()
        self.staging.publish(self.plan.other_files())

    @contextlib.contextmanager
    def _tidy(self) -> Iterator[None]:
        """Remove the folder after a failure if nothing in it can be resumed.

        Errors of the system about the disk become one clear error.
        """
        try:
            yield
        except BaseException as error:
            n_finished = self.staging.n_finished()
            hopeless = isinstance(error, _LostError) or n_finished == 0
            if hopeless and self.processes.world == 1:
                self.staging.remove()
            if not isinstance(error, OSError):
                raise
            kept = f"; {n_finished} finished files are kept in '{self.staging.folder}'"
            problem = error.strerror or str(error)
            remedy = remedy_for(error) + (kept if n_finished else "")
            raise CheckpointError(f"write to '{self.staging.output}'", problem, remedy) from error


class _Processes:
    """This process, number `rank` of `world`, among those that share a merge.

    Joins the existing process group, or makes the one that torchrun's variables describe and
    destroys it when the process ends; otherwise the process is alone.
    """

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        if not distributed.is_available():
            return
        if not distributed.is_initialized() and distributed.is_torchelastic_launched():
            distributed.init_process_group("gloo")
            atexit.register(_destroy_group)
        if distributed.is_initialized():
            self.rank, self.world = distributed.get_rank(), distributed.get_world_size()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Wait at the end until every process has left the block; if one failed, all fail."""
        try:
            yield
        except Exception as error:
            self._gathered(str(error))
            raise
        for rank, failure in enumerate(self._gathered(None)):
            if failure is not None:
                asked, problem = f"merge with {self.world} processes", f"process {rank} failed"
                remedy = "Mend that and start all of them again"
                raise CheckpointError(asked, f"{problem}: {failure}", remedy)

    def _gathered(self, failure: str | None) -> list[str | None]:
        """Return what failed in each process; waits for all of them."""
        failures = [failure] * self.world
        if self.world > 1:
            distributed.all_gather_object(failures, failure)
        return failures


def _destroy_group() -> None:  # if it lives until exit, gloo's threads abort the process
    if distributed.is_initialized():
        distributed.destroy_process_group()


class _LostError(CheckpointError):
    """Rounding left too little of a delta."""


def _identity(plan: MergePlan) -> dict[str, Any]:
    """Return the values that must be equal when a merge is run again."""
    base = {
        s.name: {
            "bytes": s.header.size_bytes,
            "mtime_ns": s.mtime_ns,
            "header": header_digest(s.header),
        }
        for s in plan.base.shards.values()
    }
    return {
        "version of lora_inject": __version__,
        "plan": plan.digest,
        "adapters": [digest(adapter) for adapter in plan.adapters],
        "base": base,
    }


def _peak_memory_bytes() -> int | None:
    """Return the most memory that this process ever held, None where the system is not Linux."""
    # Not getrusage: it starts from the memory of the parent process.
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        if peak := re.search(r"VmHWM:\s*(\d+)", status):
            return 1024 * int(peak[1])
    return None


# The folder of an unfinished merge --------------------------------------------------------------


def check_output(base: Checkpoint, output: str | Path, *, overwrite: bool = False) -> Path:
    """Return an output folder, links resolved, that can be written without changing other files.

    With `overwrite` it may hold a checkpoint: files alone, one of them with weights.

    Raises:
        CheckpointError: It is the base, inside or around it, a file, a mount point, or not empty.
    """
    asked = f"write to '{output}'"
    folder = user_path("merge, output", output, CheckpointError).resolve()
    inside = base.folder in folder.parents and not base.lone
    if folder == base.folder or inside or folder in base.folder.parents:
        problem = f"it is the base '{base.folder}', or one is inside the other"
        raise CheckpointError(asked, problem, "Give another folder")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(asked, "it is a file", "Give the name of a folder")
    if folder.is_dir():
        _check_content(folder, asked, overwrite=overwrite)
        if folder.is_mount():
            problem = "it is a mount point, and the output gets its name by a rename"
            raise CheckpointError(asked, problem, "Give a folder inside it")
    return folder


def _check_content(folder: Path, asked: str, *, overwrite: bool) -> None:
    """Refuse a folder that holds something, but for a checkpoint that may be replaced."""
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return
    staging = Staging(folder)
    if not staging.files.exists():  # a process died between the rename and the end
        staging.remove()
    if overwrite and _is_checkpoint(folder):
        return
    which = "what is in it is no checkpoint" if overwrite else "it is not empty"
    remedy = "Give another folder, or remove this one"
    if not overwrite:
        remedy += "; overwrite=True replaces a checkpoint"
    raise CheckpointError(asked, f"{which} ({', '.join(names[:4])})", remedy)


def _is_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds what a merge writes: files, `model*.safetensors` among them."""
    paths = list(folder.iterdir())
    has_weights = any(path.match("model*.safetensors") for path in paths)
    is_adapter = any(path.name.startswith("adapter_") for path in paths)
    return has_weights and not is_adapter and all(path.is_file() for path in paths)


def _check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse a disk without enough room."""
    free = free_bytes(folder)
    if free < needed_bytes + min(SPARE_BYTES, needed_bytes):
        asked = f"write {needed_bytes:,} bytes to '{folder}'"
        remedy = "Free some space, or give a folder on another disk"
        raise CheckpointError(asked, f"only {free:,} are free", remedy)


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on, or would be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _shared_output(asked: str, removed: Path) -> CheckpointError:
    """Return the error of a merge whose unfinished files somebody else has removed."""
    problem = f"'{removed}' was removed: another merge works on the same output"
    remedy = "Wait until it ends; to share one merge, start both with torchrun"
    return CheckpointError(asked, problem, remedy)


class Staging:
    """The folder of an unfinished merge into `output`; what is in `files` becomes the output."""

    def __init__(self, output: Path, *, overwrite: bool = False) -> None:
        self.output = output
        self.overwrite = overwrite
        name = output.name  # shortened, as a name takes at most 255 bytes
        mark = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
        self.folder = output.with_name(f".{name[:50]}.{mark}.merging")
        self.files = self.folder / "files"
        self._records = self.folder / "records"

    def open(self, identity: Mapping[str, Any]) -> None:
        """Create the folder, or resume the merge in it; refuse another merge's folder.

        `identity` identifies the merge, as plain data. Half-written files are removed.
        """
        for folder in (self.files, self._records):
            folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob("*.partial"):
            stale.unlink(missing_ok=True)
        manifest = self.folder / "manifest.json"
        if not manifest.exists():
            replace_file(manifest, json.dumps(identity, indent=1, sort_keys=True).encode())
        asked = f"resume the merge in '{self.output}'"
        known = read_json(manifest, asked, CheckpointError)
        if known != identity:
            known = known if isinstance(known, dict) else {}
            other = [name for name in identity if known.get(name) != identity[name]]
            problem = f"it was of something else: {', '.join(other)} differ"
            remedy = f"Remove '{self.folder}' to begin again, or give another output folder"
            raise CheckpointError(asked, problem, remedy)

    def partial(self) -> Path:
        """Return a new name for a file that is being written."""
        return self.folder / f"{secrets.token_hex(8)}.partial"

    def finish(self, partial: Path, shard: OutputShard, record: Mapping[str, Any]) -> None:
        """Add a finished, durable weight file and write its record."""
        try:
            partial.replace(self.files / shard.name)
        except FileNotFoundError:
            raise _shared_output(f"write '{shard.name}'", partial) from None
        fsync_dir(self.files)
        replace_file(self._record(shard), json.dumps(record, sort_keys=True).encode())

    def record(self, shard: OutputShard) -> dict[str, Any] | None:
        """Return the record of a finished weight file; None if it must be written again."""
        path, file = self._record(shard), self.files / shard.name
        if not path.exists() or not file.is_file():
            return None
        with contextlib.suppress(CheckpointError):
            if read_header(file).raw == shard.header.raw:
                return read_json(path, "resume", CheckpointError)  # type: ignore[no-any-return]
        return None

    def _record(self, shard: OutputShard) -> Path:
        return self._records / f"{hashlib.sha256(shard.name.encode()).hexdigest()[:32]}.json"

    def n_finished(self) -> int:
        """Count the finished weight files."""
        return len(list(self._records.glob("*.json")))

    def publish(self, side_files: Mapping[str, bytes]) -> None:
        """Add the other files by their relative paths, and rename all to the output in one step."""
        asked = f"write to '{self.output}'"
        if not self.files.is_dir():
            raise _shared_output(asked, self.files)
        for name, data in side_files.items():
            path = self.files / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # of an earlier attempt
            write_new(path, data)
        for folder in {(self.files / name).parent for name in side_files} | {self.files}:
            fsync_dir(folder)
        try:
            with out_of_the_way(self.output) if self.overwrite else contextlib.nullcontext():
                rename_folder(self.files, self.output)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            names = sorted(path.name for path in self.output.glob("*"))[:4]
            problem = f"since this merge began somebody else has written it ({', '.join(names)})"
            raise CheckpointError(asked, problem, "Give each merge an output of its own") from None
        fsync_dir(self.output.parent)
        self.remove()

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
