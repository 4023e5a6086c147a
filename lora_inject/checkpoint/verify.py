"""Check a merged checkpoint: each value by the textbook formula, each other byte by the base's.

The plan is made again from base and adapters: which tensors change, and the layout of the files.
From there on nothing of the merge is used. Each merged value is what `formula.py` gives, off by
what a sum may be off in float32 and rounded once; each update is in the tensor of its own name.

So this finds damaged files, other adapters, weights and bases, a wrong orientation, expert, slice
or rounding. It does not prove that the adapter's files say the right scale, that the class of the
base says the right names and ties, or that the adapter is of any use on this base.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.formula import Formula
from lora_inject.checkpoint.index import (
    Checkpoint,
    changed_config,
    read_config,
    resolve_inside,
)
from lora_inject.checkpoint.merge_inputs import Given, MergeOptions, names_of_site, renamed
from lora_inject.checkpoint.merge_plan import MergePlan, plan_merge
from lora_inject.checkpoint.output_files import OutputShard, TensorJob
from lora_inject.checkpoint.packed import rows_in_memory
from lora_inject.checkpoint.pieces import COPY_BYTES, BytesDone, Progress, check_unchanged
from lora_inject.core.files.row_reader import RowReader
from lora_inject.core.files.safetensors_file import Header, TensorEntry, read_header
from lora_inject.core.spec.names import counted, printable
from lora_inject.core.spec.tables import MOST_NAMES, ListReport, in_bytes, wrapped
from lora_inject.errors import CheckpointError, user_path

BLOCK_ELEMENTS = 1 << 17
"""Values compared at a time, which stay in a core's cache in float64."""


@dataclass(frozen=True)
class VerifyReport(ListReport):
    """What a verification found.

    Attributes:
        n_tensors: Tensors that were computed again.
        n_values: Values in them.
        copied_bytes: Bytes that were compared with the base's.
        problems: What is wrong; empty for a correct checkpoint.
    """

    n_tensors: int = 0
    n_values: int = 0
    copied_bytes: int = 0
    problems: tuple[str, ...] = ()

    def _lines(self, width: int, *, everything: bool) -> Iterator[str]:
        """Yield what is wrong, a part of it unless `everything`, and what was compared."""
        wrong = [f"wrong: {problem}" for problem in sorted(self.problems)]
        if not everything and len(wrong) > MOST_NAMES:
            wrong[MOST_NAMES:] = [f"and {len(wrong) - MOST_NAMES:,} more (--all)"]
        totals = (
            f"{'NOT ' if self.problems else ''}verified: "
            f"{counted(self.n_tensors, 'tensor')} computed again ({self.n_values:,} values), "
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
    found = verify_shards(plan, places, progress)
    return replace(found, problems=(*problems, *found.problems))


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
    sources = plan.base.shards.values()
    for source in sources:
        check_unchanged(source)
    of = BaseClass(plan.base, plan.options.tie)
    problems, readers = [*misplaced(plan, of)], dict[str, RowReader]()
    for shard in plan.shards:
        if shard.name in places and (problem := _header_problem(shard, places[shard.name])):
            problems.append(f"'{shard.name}': {problem}")
        elif shard.name in places:
            readers[shard.name] = RowReader(places[shard.name])
    shards = [shard for shard in plan.shards if shard.name in readers]
    done = BytesDone(sum(shard.data_bytes for shard in shards), progress)
    with ThreadPoolExecutor(plan.options.n_threads, thread_name_prefix="verify") as pool:
        check = _Check(plan, of, shards, readers, pool, done)
        problems += [problem for shard in shards for problem in check.shard(shard)]
    for source in sources:
        check_unchanged(source)
    return VerifyReport(check.n_tensors, check.n_values, check.copied_bytes, tuple(problems))


def _header_problem(shard: OutputShard, path: Path) -> str:
    try:
        there = read_header(path)
    except CheckpointError as error:
        return error.found
    return "" if there.raw == shard.header.raw else _other_header(there, shard.header)


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


def misplaced(plan: MergePlan, of: BaseClass) -> Iterator[str]:
    """Yield which updates are not where their names say, or nowhere; places are not asked."""
    where = defaultdict[str, set[str]](set)
    for job in plan.jobs:
        for placed in job.placed:
            where[placed.site].add(job.name)
    for spec in (s.spec for adapter in plan.adapters for s in adapter.state.sites.values()):
        names = [renamed(name, plan.options.rename) for name in names_of_site(spec)]
        for name in sorted(where[spec.name] - {*names}):
            place = of.place_of(name) if of.known else None
            said = (of.place_of(other) for other in names) if place is not None else ()
            if not any(each is not None and each.name == place.name for each in said if place):
                yield f"'{name}': it has the update of '{spec.name}', another layer's"
        if not where[spec.name] and not any(of.tie_of(name) & {*where} for name in names):
            yield f"'{spec.name}': no tensor has its update"


class _Check:
    """Compares the tensors of written files with those that are due.

    Attributes:
        n_tensors: Tensors that were computed.
        n_values: Values in them.
        copied_bytes: Bytes that equal the base's.
    """

    def __init__(
        self,
        plan: MergePlan,
        of: BaseClass,
        shards: Sequence[OutputShard],
        readers: Mapping[str, RowReader],
        pool: ThreadPoolExecutor,
        done: BytesDone,
    ) -> None:
        self.plan, self.of, self.pool, self.done, self.readers = plan, of, pool, done, readers
        self.entries = {
            name: (readers[shard.name], entry)
            for shard in shards
            for name, entry in shard.header.tensors.items()
        }
        self.n_tensors = self.n_values = self.copied_bytes = 0

    def shard(self, shard: OutputShard) -> Iterator[str]:
        """Yield what is wrong in a file."""
        base = RowReader(shard.base.path)
        for part in shard.content:
            if isinstance(part, TensorEntry):
                yield from self._copied(part, shard.header.tensors[part.name], base)
            elif part.outputs[0] in shard.header.tensors:  # else it is of another file
                yield from self._computed(part)

    def _copied(self, due: TensorEntry, entry: TensorEntry, base: RowReader) -> Iterator[str]:
        file = self.entries[entry.name][0]
        for at in range(0, due.n_bytes, COPY_BYTES):
            n_bytes = min(COPY_BYTES, due.n_bytes - at)
            pair = file.bytes(entry.start + at, n_bytes), base.bytes(due.start + at, n_bytes)
            self.done(n_bytes)
            if pair[0] != pair[1]:
                yield f"'{entry.name}': it differs from the base, which no adapter touches"
                return
            self.copied_bytes += n_bytes

    def _computed(self, job: TensorJob) -> Iterator[str]:
        names = [name for name in job.outputs if name in self.entries]
        if len(names) < len(job.outputs):
            return  # a file is missing, which is told
        formula = Formula(self.plan, self.of, job)
        unit = job.packed.unit if job.packed is not None and job.again else 1
        step = max(unit, BLOCK_ELEMENTS // max(1, formula.n_cols) // unit * unit)
        blocks = [(at, min(at + step, formula.n_rows)) for at in range(0, formula.n_rows, step)]
        is_right = self._packed if job.again else self._plain
        n_bytes = sum(self.entries[name][1].n_bytes for name in names)
        wrong = []
        for (start, stop), right in zip(
            blocks, self.pool.map(lambda b: is_right(formula, *b), blocks), strict=True
        ):
            self.done(n_bytes * (stop - start) // formula.n_rows)
            wrong += [] if right else [start]
        self.n_tensors += len(names)
        self.n_values += sum(self.entries[name][1].n_elements for name in names)
        if wrong:
            places = f"rows {wrong[0]:,} to {min(wrong[0] + step, formula.n_rows):,}"
            more = f" and {len(wrong) - 1:,} more blocks" if wrong[1:] else ""
            yield f"'{job.name}': {places}{more} are not what the formula gives"

    @torch.inference_mode()
    def _plain(self, formula: Formula, start: int, stop: int) -> bool:
        reader, entry = self.entries[formula.job.name]
        found = reader.rows(entry, formula.n_cols, start, stop)
        return formula.rows(start, stop).allows(found)

    @torch.inference_mode()
    def _packed(self, formula: Formula, start: int, stop: int) -> bool:
        """Whether values in few bits are as near to the formula as its own are in them.

        Those of sums that are off one way or the other count, too: a scale turns with a value.
        """
        packed = formula.job.packed
        assert packed is not None
        due = formula.rows(start, stop)

        def written(role: str, n_cols: int, first: int, last: int) -> Tensor:
            part = packed.parts[role]
            reader, entry = self.entries[part.name]
            here = replace(part, start=entry.start, stop=entry.stop)
            return reader.rows(here, n_cols, first, last).clone()

        off = (packed.values(written, start, stop) - due.values).abs()
        bound = torch.zeros_like(due.values)
        for sign in (-1, 0, 1):
            sums = due.values + sign * due.slack * due.values.sign()
            parts = rows_in_memory(packed.encoded(sums.float()))
            mine = (packed.values(parts, 0, stop - start) - due.values).abs()
            bound = torch.maximum(bound, mine)
        return bool((off <= bound + 4 * due.slack).all())
