"""Merge adapters into a checkpoint on disk: plan, write each weight file, publish in one step.

Weight files and side files are written into a hidden folder next to the output, which gets the
output's name in one rename when all of them are complete. So a process that dies leaves nothing
under that name. What it left in the hidden folder goes when the merge is started again.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lora_inject.checkpoint.index import INDEX_SUFFIX, Checkpoint, find_side_files
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
    write_new,
)
from lora_inject.core.files.row_reader import read_at
from lora_inject.core.functional.merge_report import MergeReport, TensorReport
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
        verified: Whether the output was verified before it was published.
        seconds: From the plan to the end.
    """

    output: Path
    n_bytes: int
    verified: bool
    seconds: float

    def totals(self) -> str:
        """Return what was written, how large it is and how long it took."""
        checked = ", verified" if self.verified else ""
        lost = f"; {self.warning}" if self.warning else ""
        return (
            f"merged {len(self.tensors):,} of {self.n_tensors:,} tensors into {self.output}: "
            f"{in_bytes(self.n_bytes)} in {self.seconds:.1f} s{checked}{lost}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**super().to_dict(), "output": str(self.output)}


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
    bytes. If the process is killed, the output is absent or complete. Of two merges into one output
    the one that began later has it, and the other raises.

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
    _check_space(folder, plan.n_bytes)
    counted = BytesDone(sum(shard.data_bytes for shard in plan.shards), progress)
    tensors: list[TensorReport] = []
    with _unfinished(folder) as files:
        for shard in plan.shards:
            with (files / shard.name).open("xb") as file:
                tensors += _write(shard, plan, file, counted)
                os.fsync(file.fileno())
            _check_kept(plan.options, tensors)
        for source in plan.base.shards.values():
            check_unchanged(source)
        if plan.options.verify:
            verify_shards(plan, {shard.name: files / shard.name for shard in plan.shards}).check()
        _publish(files, folder, plan.other_files(), overwrite=overwrite)
    return MergedFiles(
        adapters=tuple((adapter.label, adapter.weight) for adapter in plan.adapters),
        tensors={tensor.name: tensor for tensor in tensors},
        n_tensors=sum(len(shard.header.tensors) for shard in plan.shards),
        notes=plan.notes,
        output=folder,
        n_bytes=plan.n_bytes,
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


def _check_kept(options: MergeOptions, reports: Sequence[TensorReport]) -> None:
    """Refuse a merge that leaves less of a delta than was asked for."""
    least = options.min_kept
    if least is None:
        return
    kept = [(tensor.kept, tensor.name) for tensor in reports if tensor.kept is not None]
    lost = sorted(row for row in kept if row[0] < least)
    if lost:
        worst = ", ".join(f"'{name}' {kept!r}" for kept, name in lost[:5])
        problem = f"rounding leaves less in {len(lost)} tensors: {worst}"
        wide = "floats (--dequantize)" if options.requantize else "float32 (--dtype)"
        remedy = f"Write {wide}, keep the adapter unmerged, or accept less (--min-kept)"
        raise CheckpointError(f"keep at least {least} of every delta", problem, remedy)


# The output, and the folder of an unfinished merge ----------------------------------------------


def check_output(base: Checkpoint, output: str | Path, *, overwrite: bool = False) -> Path:
    """Return an output folder, links resolved, that can be written without changing other files.

    With `overwrite` it may hold a checkpoint, and nothing that a merge does not write.

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
    remedy = "Give another folder, or remove this one"
    if names and not overwrite:
        remedy += "; overwrite=True replaces a checkpoint"
        raise CheckpointError(asked, f"it is not empty ({', '.join(names[:4])})", remedy)
    if names and (foreign := _foreign(folder)):
        raise CheckpointError(asked, f"it is no checkpoint: it holds {foreign}", remedy)
    return folder


def _foreign(folder: Path) -> str:
    """Return what a folder holds that no merge writes, or lacks; "" for a checkpoint."""
    weights = [path.name for path in folder.glob("*.safetensors")]
    indexes = [path.name for path in folder.glob("*" + INDEX_SUFFIX)]
    hidden = [f"{path.name}/" for path in folder.glob(".*") if path.is_dir()]
    ours = {name for name in (*weights, *indexes) if not name.startswith("adapter_")}
    others = [name for name in (*hidden, *find_side_files(folder).left) if name not in ours]
    return repr(others[0]) if others else "" if ours & {*weights} else "no weights"


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


@contextlib.contextmanager
def _unfinished(output: Path) -> Iterator[Path]:
    """Give a hidden folder beside the output; it goes at the end, unless it has another name then.

    First those go that merges into this output left when they were killed. They get another name
    before they are emptied: so a merge that is still at work there finds all of its files, or none.
    Errors of the system about the disk become one clear error.
    """
    asked = f"write to '{output}'"
    mark = hashlib.sha256(os.fsencode(output.name)).hexdigest()[:8]
    start = f".{output.name[:50]}.{mark}."  # shortened, as a name takes at most 255 bytes
    folder, aside = (output.with_name(f"{start}{secrets.token_hex(6)}.merging") for _ in range(2))
    try:
        for left in output.parent.glob(f"{glob.escape(start)}*.merging"):
            with contextlib.suppress(FileNotFoundError):
                left.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not folder.exists():
            problem = f"'{folder}' was removed: another merge works on the same output"
            raise CheckpointError(asked, problem, "Wait until it ends") from None
        problem = error.strerror or str(error)
        raise CheckpointError(asked, problem, remedy_for(error)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(
    files: Path, output: Path, other_files: Mapping[str, bytes], *, overwrite: bool
) -> None:
    """Add the other files by their relative paths, and rename all to the output in one step."""
    folders = {folder for name in other_files for folder in Path(name).parents} - {Path()}
    for folder in sorted(folders):
        (files / folder).mkdir()
    for name, data in other_files.items():
        write_new(files / name, data)
    for folder in (*folders, Path()):
        fsync_dir(files / folder)
    try:
        with out_of_the_way(output) if overwrite else contextlib.nullcontext():
            rename_folder(files, output)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        names = sorted(path.name for path in output.glob("*"))[:4]
        problem = f"since this merge began somebody else has written it ({', '.join(names)})"
        remedy = "Give each merge an output of its own"
        raise CheckpointError(f"write to '{output}'", problem, remedy) from None
    fsync_dir(output.parent)
