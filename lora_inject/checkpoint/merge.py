"""Merge adapters into a checkpoint on disk: plan, write each weight file, publish in one step.

Weight files and side files are written into a folder next to the output, which gets the output's
name in one rename when all of them are complete. So a process that dies leaves no output, and a
later run goes on with its finished files: the folder has a name of its own for each merge, and a
weight file in it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.merge_inputs import Given, MergeOptions
from lora_inject.checkpoint.merge_plan import MergePlan, plan_merge
from lora_inject.checkpoint.output_files import OutputShard
from lora_inject.checkpoint.pieces import BytesDone, Piece, Progress, check_unchanged, stream
from lora_inject.checkpoint.verify import verify_shards
from lora_inject.core.files.atomic import (
    fsync_dir,
    out_of_the_way,
    remedy_for,
    rename_folder,
    replace_file,
    write_new,
)
from lora_inject.core.files.row_reader import read_at
from lora_inject.core.files.safetensors_file import read_header
from lora_inject.core.files.strict_json import read_json
from lora_inject.core.functional.merge_report import MergeReport, TensorReport
from lora_inject.core.spec.names import counted as count
from lora_inject.core.spec.tables import in_bytes
from lora_inject.errors import CheckpointError, user_path

SPARE_BYTES = 64 << 20
"""Left free for small files and the file system's own needs."""


@dataclass(frozen=True, repr=False, kw_only=True)
class MergedFiles(MergeReport):
    """What `merge_checkpoint` did; `n_tensors` counts those that were copied too.

    Attributes:
        output: The folder that was written.
        n_bytes: Size of all weight files.
        resumed: Weight files that an earlier run had finished.
        verified: Whether the output was verified before it was published.
        seconds: From the plan to the end.
    """

    output: Path
    n_bytes: int
    resumed: tuple[str, ...]
    verified: bool
    seconds: float

    def totals(self) -> str:
        """Return what was written, how large it is and how long it took."""
        resumed = f"; {count(len(self.resumed), 'file')} finished earlier" if self.resumed else ""
        checked = ", verified" if self.verified else ""
        lost = f"; {self.warning}" if self.warning else ""
        return (
            f"merged {len(self.tensors):,} of {self.n_tensors:,} tensors into {self.output}: "
            f"{in_bytes(self.n_bytes)} in {self.seconds:.1f} s{checked}{resumed}{lost}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**super().to_dict(), "output": str(self.output), "resumed": list(self.resumed)}


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

    Memory does not grow with the model: adapters are held whole, and row blocks of the base are
    read, updated in float32, rounded once and written. Tensors that no adapter changes keep their
    bytes. If the process is killed, the output is absent or complete, and the same call continues
    with the finished files.

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
    staging = _Staging(folder, plan.digest)
    with staging.kept_if_of_use():
        reports = staging.finished(plan.shards)
        resumed = tuple(reports)
        todo = [shard for shard in plan.shards if shard.name not in reports]
        _check_space(folder, sum(shard.n_bytes for shard in todo))
        counted = BytesDone(sum(shard.data_bytes for shard in plan.shards), progress)
        counted(sum(shard.data_bytes for shard in plan.shards if shard.name in reports))
        for shard in todo:
            with staging.new_file(shard) as file:
                reports[shard.name] = _write(shard, plan, file, counted)
                _check_kept(plan.options, reports)
                os.fsync(file.fileno())
            staging.finish(shard, reports[shard.name])
        _check_kept(plan.options, reports)
        for source in plan.base.shards.values():
            check_unchanged(source)
        if plan.options.verify:
            places = {shard.name: staging.files / shard.name for shard in plan.shards}
            verify_shards(plan, places).check()
        staging.publish(plan.other_files(), overwrite=overwrite)
    tensors = [tensor for shard in plan.shards for tensor in reports[shard.name]]
    return MergedFiles(
        adapters=tuple((adapter.label, adapter.weight) for adapter in plan.adapters),
        tensors={tensor.name: tensor for tensor in tensors},
        n_tensors=sum(len(shard.header.tensors) for shard in plan.shards),
        notes=plan.notes,
        output=folder,
        n_bytes=plan.n_bytes,
        resumed=resumed,
        verified=plan.options.verify,
        seconds=time.perf_counter() - began,
    )


def _write(
    shard: OutputShard, plan: MergePlan, file: BinaryIO, counted: BytesDone
) -> list[TensorReport]:
    """Write one output file; return the reports of its computed tensors."""
    file.write(shard.header.raw)
    with stream(shard, plan) as (pieces, reports):
        for piece in pieces:
            file.seek(piece.at)
            if piece.source is None:
                file.write(piece.data)
            else:
                _copy(piece, piece.source.fd, file)
            counted(piece.n_bytes)
    file.flush()
    return list(reports.values())


def _copy(piece: Piece, source: int, file: BinaryIO) -> None:
    """Copy bytes of the base, in the kernel if it can, else in memory."""
    file.flush()
    done = 0
    # Windows has no such call, and some file systems refuse it; a full disk refuses what follows.
    with contextlib.suppress(AttributeError, OSError):
        while done < piece.n_bytes:
            left, start, at = piece.n_bytes - done, piece.start + done, piece.at + done
            n_bytes = os.copy_file_range(source, file.fileno(), left, start, at)
            if n_bytes == 0:
                break
            done += n_bytes
    data = bytearray(piece.n_bytes - done)
    read_at(source, memoryview(data), piece.start + done)
    file.seek(piece.at + done)
    file.write(data)


class _LostError(CheckpointError):
    """Rounding left too little of a delta."""


def _check_kept(options: MergeOptions, reports: Mapping[str, Sequence[TensorReport]]) -> None:
    """Refuse a merge that leaves less of a delta than was asked for."""
    least = options.min_kept
    if least is None:
        return
    kept = [(t.kept, t.name) for tensors in reports.values() for t in tensors if t.kept is not None]
    lost = sorted(row for row in kept if row[0] < least)
    if lost:
        worst = ", ".join(f"'{name}' {kept!r}" for kept, name in lost[:5])
        problem = f"rounding leaves less in {len(lost)} tensors: {worst}"
        wide = "floats (--dequantize)" if options.requantize else "float32 (--dtype)"
        remedy = f"Write {wide}, keep the adapter unmerged, or accept less (--min-kept)"
        raise _LostError(f"keep at least {least} of every delta", problem, remedy)


# The output, and the folder of an unfinished merge ----------------------------------------------


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
    if not folder.exists():
        return folder
    if not folder.is_dir():
        raise CheckpointError(asked, "it is a file", "Give the name of a folder")
    if folder.is_mount():
        problem = "it is a mount point, and the output gets its name by a rename"
        raise CheckpointError(asked, problem, "Give a folder inside it")
    names = sorted(path.name for path in folder.iterdir())
    if names and not (overwrite and _is_checkpoint(folder)):
        which = "what is in it is no checkpoint" if overwrite else "it is not empty"
        remedy = "Give another folder, or remove this one"
        if not overwrite:
            remedy += "; overwrite=True replaces a checkpoint"
        raise CheckpointError(asked, f"{which} ({', '.join(names[:4])})", remedy)
    return folder


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


class _Staging:
    """The folder of an unfinished merge, which its digest identifies, into `output`.

    What is in `files` becomes the output. Beside it lies the report of each finished weight file.
    """

    def __init__(self, output: Path, digest: str) -> None:
        self.output = output
        name = output.name  # shortened, as a name takes at most 255 bytes
        mark = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
        self._of_output = f".{name[:50]}.{mark}."
        self.folder = output.with_name(f"{self._of_output}{digest[:16]}.merging")
        self.files = self.folder / "files"

    def _report(self, shard: OutputShard) -> Path:
        return self.folder / f"{shard.name}.json"

    def finished(self, shards: Sequence[OutputShard]) -> dict[str, list[TensorReport]]:
        """Return the reports of finished weight files; those that are damaged are made again."""
        self.files.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob("*.partial"):
            stale.unlink(missing_ok=True)
        reports = {}
        for shard in shards:
            path = self.files / shard.name
            # A merge that is stopped once it is published leaves reports of files that have moved.
            with contextlib.suppress(CheckpointError, FileNotFoundError):
                if self._report(shard).exists() and read_header(path).raw == shard.header.raw:
                    rows: Any = read_json(self._report(shard), "resume", CheckpointError)
                    reports[shard.name] = [
                        TensorReport(**{**row, **{k: tuple(row[k]) for k in ("shape", "sites")}})
                        for row in rows
                    ]
        return reports

    @contextlib.contextmanager
    def new_file(self, shard: OutputShard) -> Iterator[BinaryIO]:
        """Give a file to write under a temporary name; it gets its own when it is on the disk."""
        partial = self.folder / f"{secrets.token_hex(8)}.partial"
        try:
            with partial.open("wb") as file:
                yield file
            partial.replace(self.files / shard.name)
        except FileNotFoundError:
            raise self._removed(f"write '{shard.name}'") from None
        finally:
            partial.unlink(missing_ok=True)

    def finish(self, shard: OutputShard, reports: Sequence[TensorReport]) -> None:
        """Write the report of a finished file."""
        fsync_dir(self.files)
        data = json.dumps([report.to_dict() for report in reports]).encode()
        replace_file(self._report(shard), data)

    def _removed(self, asked: str) -> CheckpointError:
        problem = f"'{self.files}' was removed: another merge works on the same output"
        return CheckpointError(asked, problem, "Wait until it ends")

    @contextlib.contextmanager
    def kept_if_of_use(self) -> Iterator[None]:
        """Remove the folder after a failure if nothing in it can be resumed.

        Errors of the system about the disk become one clear error.
        """
        try:
            yield
        except BaseException as error:
            n_finished = len(list(self.folder.glob("*.json")))
            finished = count(n_finished, "finished file")
            kept = f"The same again goes on from {finished} in '{self.folder}'"
            if isinstance(error, _LostError) or n_finished == 0 or not self.files.exists():
                shutil.rmtree(self.folder, ignore_errors=True)
            elif isinstance(error, KeyboardInterrupt):
                error.add_note(f"{kept}. Delete that folder to give it up.")
            if not isinstance(error, OSError):
                raise
            problem = error.strerror or str(error)
            remedy = remedy_for(error) + (f". {kept}" if n_finished else "")
            raise CheckpointError(f"write to '{self.output}'", problem, remedy) from error

    def publish(self, side_files: Mapping[str, bytes], *, overwrite: bool) -> None:
        """Add the other files by their relative paths, and rename all to the output in one step.

        What other merges left unfinished for the same output is removed.
        """
        asked = f"write to '{self.output}'"
        if not self.files.is_dir():
            raise self._removed(asked)
        for name, data in side_files.items():
            path = self.files / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # of an earlier attempt
            write_new(path, data)
        for folder in {(self.files / name).parent for name in side_files} | {self.files}:
            fsync_dir(folder)
        try:
            with out_of_the_way(self.output) if overwrite else contextlib.nullcontext():
                rename_folder(self.files, self.output)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            names = sorted(path.name for path in self.output.glob("*"))[:4]
            problem = f"since this merge began somebody else has written it ({', '.join(names)})"
            raise CheckpointError(asked, problem, "Give each merge an output of its own") from None
        fsync_dir(self.output.parent)
        for path in self.output.parent.iterdir():
            if path.name.startswith(self._of_output) and path.suffix == ".merging":
                shutil.rmtree(path, ignore_errors=True)
