"""Check a merged checkpoint byte by byte.

The plan is made again from base and adapters, every changed tensor is computed again, some of its
rows by other code than the merge's, and every other byte is compared with the base's. No record of
the merge is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch

from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.formula import check_formula
from lora_inject.checkpoint.index import (
    Checkpoint,
    changed_config,
    read_config,
    resolve_inside,
)
from lora_inject.checkpoint.merge_inputs import Given, MergeOptions
from lora_inject.checkpoint.merge_plan import MergePlan, plan_merge
from lora_inject.checkpoint.output_files import OutputShard
from lora_inject.checkpoint.pieces import BytesDone, Progress, stream
from lora_inject.core.files.row_reader import read_at
from lora_inject.core.files.safetensors_file import FLOATS, Header, read_header
from lora_inject.core.spec.names import counted, printable
from lora_inject.core.spec.tables import MOST_NAMES, ListReport, in_bytes, wrapped
from lora_inject.errors import CheckpointError, user_path

MOST_NEIGHBORS = 1e-3
"""Share of a tensor's values that may be one unit in the last place off."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class VerifyReport(ListReport):
    """What a verification found.

    Attributes:
        n_tensors: Tensors that were computed again.
        n_values: Values in them.
        n_neighbors: Values that are one unit in the last place off.
        copied_bytes: Bytes that were compared with the base's.
        problems: What is wrong; empty for a correct checkpoint.
    """

    n_tensors: int = 0
    n_values: int = 0
    n_neighbors: int = 0
    copied_bytes: int = 0
    problems: tuple[str, ...] = ()

    def __add__(self, other: VerifyReport) -> VerifyReport:
        return VerifyReport(
            *(mine + more for mine, more in zip(astuple(self), astuple(other), strict=True))
        )

    def _lines(self, width: int, *, everything: bool) -> Iterator[str]:
        """Yield what is wrong, a part of it unless `everything`, and what was compared."""
        wrong = [f"wrong: {problem}" for problem in sorted(self.problems)]
        if not everything and len(wrong) > MOST_NAMES:
            wrong[MOST_NAMES:] = [f"and {len(wrong) - MOST_NAMES:,} more (--all)"]
        near = f", {self.n_neighbors:,} of them one unit in the last place off"
        values = f"{self.n_values:,} values{near if self.n_neighbors else ''}"
        totals = (
            f"{'NOT ' if self.problems else ''}verified: "
            f"{counted(self.n_tensors, 'tensor')} computed again ({values}), "
            f"{in_bytes(self.copied_bytes)} equal to the base's"
        )
        yield from map(printable, wrong)
        yield from wrapped(totals, width)

    def check(self) -> None:
        """Raise an error if there are problems.

        Raises:
            CheckpointError: There are problems.
        """
        if self.problems:
            more = f"; and {len(self.problems) - 5} more" if len(self.problems) > 5 else ""
            problem = "; ".join(self.problems[:5]) + more
            remedy = "Merge again, and check the disk and the memory if this comes back"
            raise CheckpointError("verify the merged checkpoint", problem, remedy)


def verify_checkpoint(
    base: str | Path | Checkpoint,
    adapters: Sequence[Given],
    merged: str | Path,
    *,
    options: MergeOptions | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check that a folder is exactly what merging would write, hidden files aside.

    A file that was added is a problem, as programs read whatever lies in a model's folder:
    transformers puts the adapter of an `adapter_config.json` onto the merged weights.

    Args:
        base: Folder of the base.
        adapters: The adapters of the merge.
        merged: The folder to check.
        options: The options of the merge.
        progress: Called with bytes done and bytes in all.

    Returns:
        A report; its `check()` raises if there are problems.

    Raises:
        CheckpointError: The merge could not be planned, or `merged` is not a folder.
    """
    plan = plan_merge(base, adapters, options)
    folder = user_path("verify", merged, CheckpointError).resolve()
    if not folder.is_dir():
        raise CheckpointError(f"verify '{merged}'", "there is no such folder", "Check the path")
    problems = _other_files(plan, folder)
    places = {}
    for shard in plan.shards:
        try:
            places[shard.name] = resolve_inside(folder, shard.name)
        except CheckpointError as error:
            problems.append(f"'{shard.name}': {error.found}")
    return VerifyReport(problems=tuple(problems)) + verify_shards(plan, places, progress)


def _other_files(plan: MergePlan, folder: Path) -> list[str]:
    """Compare the index, the config and the side files, and look for files that do not belong."""
    problems, others = [], plan.other_files()
    for name, data in others.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"'{name}' is missing")
        elif path.read_bytes() != data:
            problems.append(f"'{name}' is not what it should be")
            if name == "config.json":  # programs rewrite it; what the merge changed must be there
                config = read_config(folder)
                changes = plan.config_changes.items()
                wrong = [k for k, v in changes if changed_config(config, {k: v}) != config]
                problems[-1] += "".join(f", {k} is {config.get(k)!r}" for k in wrong)
    written = {*others, *(shard.name for shard in plan.shards)}
    strangers = sorted(name for name in _visible_files(folder) if name not in written)
    problems += [f"'{name}' does not belong there" for name in strangers]
    return problems


def _visible_files(folder: Path) -> Iterator[str]:
    """Yield the relative path of each file, but for what lies under a name that begins with a dot.

    Those are what tools leave, such as `.git` and `.cache`; no program reads them as a model.
    """
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if not path.is_dir() and not any(part.startswith(".") for part in relative.parts):
            yield relative.as_posix()


def verify_shards(
    plan: MergePlan, places: Mapping[str, Path], progress: Progress | None = None
) -> VerifyReport:
    """Check output shards at any path; shards without a path are skipped."""
    shards = [shard for shard in plan.shards if shard.name in places]
    counter = BytesDone(sum(shard.data_bytes for shard in shards), progress)
    of = BaseClass(plan.base, plan.options.tie)
    each = (_verify_shard(plan, of, shard, places[shard.name], counter) for shard in shards)
    return sum(each, VerifyReport())


def _verify_shard(
    plan: MergePlan, of: BaseClass, shard: OutputShard, path: Path, counter: BytesDone
) -> VerifyReport:
    try:
        there = read_header(path)
        problem = "" if there.raw == shard.header.raw else _other_header(there, shard.header)
    except CheckpointError as error:
        problem = error.found
    if problem:
        return VerifyReport(problems=(f"'{shard.name}': {problem}",))
    found = _compared(plan, shard, path, counter)
    if found.problems:
        return found
    return replace(found, problems=tuple(check_formula(plan, of, shard, path)))


def _compared(plan: MergePlan, shard: OutputShard, path: Path, counter: BytesDone) -> VerifyReport:
    """Compare the pieces of a file with those that are due."""
    there, near, far = shard.header.tensors, Counter[str](), Counter[str]()
    copied_bytes, differing = 0, dict[str, None]()
    with path.open("rb") as file, stream(shard, plan) as (pieces, _):
        for piece in pieces:
            written = _read(file.fileno(), piece.at, piece.n_bytes)
            counter(piece.n_bytes)
            if piece.source is None:
                if written != piece.data:
                    off = _distances(written, piece.data, there[piece.name].dtype)
                    near[piece.name] += off[0]
                    far[piece.name] += off[1]
                continue
            due = _read(piece.source.fd, piece.start, piece.n_bytes)
            if written == due:
                copied_bytes += piece.n_bytes
            else:
                first = next(i for i in range(piece.n_bytes) if written[i] != due[i])
                differing[_where(shard, piece.at + first)] = None
    problems, names = [*differing], [n for j in shard.jobs for n in j.outputs if n in there]
    for name in names:
        size = there[name].n_elements
        if far[name]:
            problems.append(f"'{name}': {far[name]} of {size} values are wrong")
        elif near[name] > MOST_NEIGHBORS * size:
            problems.append(f"'{name}': {near[name]} of {size} values are one unit off")
    n_values = sum(there[name].n_elements for name in names)
    return VerifyReport(len(names), n_values, near.total(), copied_bytes, tuple(problems))


def _other_header(there: Header, due: Header) -> str:
    """Return how a header differs; of dtypes, as of a merge with another one, the first."""
    dtypes = {name: (there.tensors[name].dtype, due.tensors[name].dtype)
              for name in there.tensors.keys() & due.tensors.keys()}  # fmt: skip
    others = sorted(name for name, (mine, wanted) in dtypes.items() if mine != wanted)
    words = "its header is not what it should be"
    if not others:
        return words
    mine, wanted = dtypes[others[0]]
    return f"{words}: '{others[0]}' is {mine} and not {wanted}, as with another dtype (--dtype)"


def _read(fd: int, at: int, n_bytes: int) -> bytearray:
    data = bytearray(n_bytes)
    read_at(fd, memoryview(data), at)
    return data


def _distances(written: bytearray, due: memoryview, dtype: str) -> tuple[int, int]:
    """Count values that are one unit in the last place off, and those that are further off."""
    both = [torch.frombuffer(b, dtype=FLOATS.get(dtype, torch.uint8)) for b in (written, due)]
    bits = _BITS[both[0].element_size()]
    apart = (both[0].view(bits).long() - both[1].view(bits).long()).abs()  # of floats of one sign
    near = int((apart == 1).sum())
    return near, int(apart.count_nonzero()) - near


def _where(shard: OutputShard, position: int) -> str:
    for entry in shard.header.tensors.values():
        if entry.start <= position < entry.stop:
            return f"'{entry.name}': it differs from the base, which no adapter touches"
    return f"'{shard.name}': byte {position} differs from the base"
