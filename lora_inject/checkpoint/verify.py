"""Checking a merged checkpoint against what it should be, byte by byte.

The plan is made anew from base and adapters, every touched tensor is computed again and
compared, and every other byte is compared with the base's. Nothing that the merge wrote down is
believed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_inject.checkpoint.index import Checkpoint, read_config, resolve_inside
from lora_inject.checkpoint.merge_plan import MergePlan, plan_merge
from lora_inject.checkpoint.options import MergeOptions
from lora_inject.checkpoint.output_files import Copy, OutputShard, TensorJob
from lora_inject.checkpoint.output_rows import Memory, fold_span, spans_of
from lora_inject.checkpoint.read import RowReader
from lora_inject.checkpoint.weighted_adapter import WeightedAdapter
from lora_inject.checkpoint.write import one_thread_each
from lora_inject.errors import CheckpointError
from lora_inject.storage.disk import open_read, read_at
from lora_inject.storage.safetensors_file import read_header

COMPARE_BYTES = 8 << 20
MOST_NEIGHBORS = 1e-3
"""Share of a tensor's values that may be one unit in the last place off."""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        n_tensors: Tensors that were computed again.
        n_values: Values in them.
        n_neighbors: Values that are one unit in the last place off.
        copied_bytes: Bytes that were compared with the base's.
        problems: What is wrong; empty for a checkpoint that is what it should be.
    """

    n_tensors: int
    n_values: int
    n_neighbors: int
    copied_bytes: int
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**asdict(self), "problems": list(self.problems)}

    def check(self) -> None:
        """Raise what was found.

        Raises:
            CheckpointError: There are problems.
        """
        if self.problems:
            more = f"; and {len(self.problems) - 5} more" if len(self.problems) > 5 else ""
            raise CheckpointError(
                "verify the merged checkpoint",
                "; ".join(self.problems[:5]) + more,
                "Merge again, and check the disk and the memory if this comes back",
            )


def verify_checkpoint(
    base: str | Path | Checkpoint,
    adapters: Sequence[WeightedAdapter],
    merged: str | Path,
    *,
    options: MergeOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check that a folder is exactly what merging would write.

    Args:
        base: Folder of the base.
        adapters: The adapters, each with its weight.
        merged: The folder to check.
        options: As they were given to the merge.
        progress: Called with bytes done and bytes in all.

    Returns:
        What was found; `check()` raises it.

    Raises:
        CheckpointError: The merge could not be planned, or `merged` is no folder.
    """
    plan = plan_merge(base, adapters, options)
    folder = Path(merged).resolve()
    if not folder.is_dir():
        raise CheckpointError(f"verify '{merged}'", "there is no such folder", "Check the path")
    problems = _other_files(plan, folder)
    places = {}
    for shard in plan.shards:
        try:
            places[shard.name] = resolve_inside(folder, shard.name)
        except CheckpointError as error:
            problems.append(f"'{shard.name}': {error.found}")
    report = verify_shards(plan, places, progress)
    return VerifyReport(
        report.n_tensors,
        report.n_values,
        report.n_neighbors,
        report.copied_bytes,
        (*problems, *report.problems),
    )


def _other_files(plan: MergePlan, folder: Path) -> list[str]:
    """Compare the index, the config and the side files, and look for files that do not belong."""
    problems = []
    for name, data in plan.other_files().items():
        path = folder / name
        if not path.is_file():
            problems.append(f"'{name}' is missing")
        elif path.read_bytes() != data:
            problems.append(f"'{name}' is not what it should be")
            if name == "config.json":  # programs rewrite it; what the merge changed must be there
                found = read_config(folder)
                wrong = [k for k, v in plan.config_changes.items() if found.get(k) != v]
                problems[-1] += "".join(f", {k} is {found.get(k)!r}" for k in wrong)
    names = {shard.name for shard in plan.shards}
    strangers = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in names)
    problems += [f"'{name}' does not belong there" for name in strangers]
    return problems


def verify_shards(
    plan: MergePlan,
    places: Mapping[str, Path],
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check output shards wherever they lie.

    Args:
        plan: What they should be.
        places: Shard name to file; shards without one are passed over.
        progress: Called with bytes done and bytes in all.
    """
    total = sum(s.data_bytes for s in plan.shards if s.name in places)
    check = _Check(plan, total, progress)
    with one_thread_each():
        for shard in plan.shards:
            if shard.name in places:
                check.shard(shard, places[shard.name])
    return VerifyReport(
        check.n_tensors, check.n_values, check.n_neighbors, check.copied, tuple(check.problems)
    )


class _Check:
    def __init__(
        self, plan: MergePlan, total: int, progress: Callable[[int, int], None] | None
    ) -> None:
        self.plan, self.total, self.progress, self.done = plan, total, progress, 0
        self.n_tensors = self.n_values = self.n_neighbors = self.copied = 0
        self.problems: list[str] = []

    def _count(self, n_bytes: int) -> None:
        self.done += n_bytes
        if self.progress is not None:
            self.progress(self.done, self.total)

    def shard(self, shard: OutputShard, path: Path) -> None:
        """Check one file."""
        try:
            header = read_header(path)
        except CheckpointError as error:
            self.problems.append(f"'{shard.name}': {error.found}")
            return
        if header.raw != shard.header.raw:
            self.problems.append(f"'{shard.name}': its header is not what it should be")
            return
        fd = open_read(path)
        try:
            for copy in shard.copies:
                self._copied(shard, copy, fd)
            for job in shard.jobs:
                self._computed(shard, job, fd)
        finally:
            os.close(fd)

    def _copied(self, shard: OutputShard, copy: Copy, fd: int) -> None:
        assert shard.base is not None
        source = open_read(shard.base.path)
        try:
            for done in range(0, copy.n_bytes, COMPARE_BYTES):
                n_bytes = min(COMPARE_BYTES, copy.n_bytes - done)
                mine, theirs = bytearray(n_bytes), bytearray(n_bytes)
                read_at(fd, memoryview(mine), copy.target_start + done)
                read_at(source, memoryview(theirs), copy.source_start + done)
                if mine != theirs:
                    first = next(i for i in range(n_bytes) if mine[i] != theirs[i])
                    self.problems.append(_where(shard, copy.target_start + done + first))
                    return
                self.copied += n_bytes
                self._count(n_bytes)
        finally:
            os.close(source)

    def _computed(self, shard: OutputShard, job: TensorJob, fd: int) -> None:
        entry, output = shard.header.tensors[job.name], RowReader(fd)
        source = None
        if job.source_shard is not None:
            source = RowReader(self.plan.base.shards[job.source_shard].path)
        far, near, memory = 0, 0, Memory(self.plan.on_disk)
        try:
            for span in spans_of(job):
                for start, rows, _, _ in fold_span(span, source, memory):
                    found = output.rows(entry, span.n_cols, start, start + rows.shape[0])
                    apart, off = _compare(found, rows)
                    near, far = near + apart, far + off
                    self._count(rows.numel() * rows.element_size())
        finally:
            if source is not None:
                source.close()
        self.n_tensors += 1
        self.n_values += entry.n_elements
        self.n_neighbors += near
        if far:
            self.problems.append(f"'{job.name}': {far} of {entry.n_elements} values are wrong")
        elif near > MOST_NEIGHBORS * entry.n_elements:
            self.problems.append(
                f"'{job.name}': {near} of {entry.n_elements} values are one unit off"
            )


def _compare(found: Tensor, wanted: Tensor) -> tuple[int, int]:
    """Count values that are one unit in the last place off, and those that are further off."""
    bits = _BITS[wanted.element_size()]
    a, b = found.contiguous().view(bits), wanted.contiguous().view(bits)
    if torch.equal(a, b):
        return 0, 0
    wrong = a != b
    a, b = _ordered(a[wrong]), _ordered(b[wrong])
    near = int(((a - b).abs() == 1).sum())
    return near, int(wrong.sum()) - near


def _ordered(bits: Tensor) -> Tensor:
    """Map the bits of floats to integers of the same order, so that neighbors differ by 1."""
    wide = bits.to(torch.int64)
    least = torch.iinfo(bits.dtype).min
    return torch.where(wide < 0, least - wide, wide)


def _where(shard: OutputShard, position: int) -> str:
    for entry in shard.header.tensors.values():
        if entry.start <= position < entry.stop:
            return f"'{entry.name}': it differs from the base, which no adapter touches"
    return f"'{shard.name}': byte {position} differs from the base"
