"""Plan a merge in full, before anything is written.

Planning reads only headers and adapters, and lays every output file out to the byte. Every error
that can be known in advance is raised here; only errors of the disk and of rounding come later.

From the updates changes follow, in this order: ties are cut, dtypes change, a vocabulary grows.
Each may change `config.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_inject.checkpoint.base_class import UNTIED, BaseClass
from lora_inject.checkpoint.index import (
    QUANTIZED_FILES,
    Checkpoint,
    changed_config,
    find_side_files,
    resolve_inside,
)
from lora_inject.checkpoint.merge_inputs import (
    Given,
    MergeOptions,
    WeightedAdapter,
    check_adapters,
    check_rename,
    weighted_adapters,
)
from lora_inject.checkpoint.output_files import OutputShard, TensorJob, clash, lay_out
from lora_inject.checkpoint.places import place_adapter
from lora_inject.checkpoint.quantized_base import FORMAT_DTYPES, unpacked, why_no_update
from lora_inject.core.files.safetensors_file import DTYPE_BITS, FLOATS
from lora_inject.core.spec.names import counted
from lora_inject.core.spec.tables import Listing, ListReport, in_bytes, sides, wrapped
from lora_inject.errors import CheckpointError


@dataclass(frozen=True)
class MergePlan(ListReport):
    """Everything that a merge will do.

    Attributes:
        base: The checkpoint that is read.
        adapters: The adapters.
        options: Options of the merge.
        shards: The output's weight files, in the order of the base's.
        config_changes: Keys of `config.json` that change; a value that is one of old ones to new
            ones changes these only.
        index: New content of the index; None if it is copied or there is none.
        side_files: Other files that are copied.
        notes: Notes for the user.
    """

    base: Checkpoint
    adapters: tuple[WeightedAdapter, ...]
    options: MergeOptions
    shards: tuple[OutputShard, ...]
    config_changes: Mapping[str, Any]
    index: bytes | None
    side_files: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """Size of all output shards."""
        return sum(shard.n_bytes for shard in self.shards)

    @property
    def jobs(self) -> tuple[TensorJob, ...]:
        """Every tensor that is computed, shard by shard."""
        return tuple(job for shard in self.shards for job in shard.jobs)

    def other_files(self) -> dict[str, bytes]:
        """Return the content of every file of the output but the weight files."""
        base = self.base
        copied = [*self.side_files, *([base.index_name] if base.index_name else ())]
        copied += ["config.json"] if base.config else []
        files = {name: resolve_inside(base.folder, name).read_bytes() for name in copied}
        if base.index_name is not None and self.index is not None:
            files[base.index_name] = self.index
        if base.config and self.config_changes:
            files["config.json"] = _json(changed_config(base.config, self.config_changes))
        return files

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, for printing and for machines."""
        adapters = [
            {"label": a.label, "weight": a.weight, "sites": len(a.state.sites)}
            for a in self.adapters
        ]
        shards = [
            {
                "name": shard.name,
                "bytes": shard.n_bytes,
                "same_layout": shard.same_layout,
                "copied_bytes": shard.copied_bytes,
                "tensors": len(shard.header.tensors),
                "merged": len(shard.jobs),
            }
            for shard in self.shards
        ]
        shown = ("name", "action", "dtype", "shape", "sites")
        return {
            "base": str(self.base.folder),
            "base_bytes": self.base.n_bytes,
            "output_bytes": self.n_bytes,
            "adapters": adapters,
            "dtype": self.options.dtype,
            "shards": shards,
            "tensors": [{key: getattr(job, key) for key in shown} for job in self.jobs],
            "config_changes": dict(self.config_changes),
            "index": "rewritten" if self.index is not None else "kept",
            "side_files": list(self.side_files),
            "notes": list(self.notes),
        }

    def _lines(self, width: int, *, everything: bool) -> Iterator[str]:
        """Yield what a merge would do; tensors of one kind share a line unless `everything`."""
        cells = [(job.name, job.action, job.dtype, sides(job.shape)) for job in self.jobs]
        rows = Listing(("tensor", "action", "dtype", "shape"), tuple(cells))
        sentences = [
            f"{a.label} x {a.weight:g}: {counted(len(a.state.sites), 'site')}"
            for a in self.adapters
        ]
        for key, value in self.config_changes.items():
            new = next(iter(value.values())) if isinstance(value, dict) else value
            sentences.append(f"config.json: {key} becomes {json.dumps(new)}")
        n_copied = sum(shard.copied_bytes for shard in self.shards)
        sentences += [f"note: {note}" for note in self.notes]
        sentences.append(
            f"would write {in_bytes(self.n_bytes)} in {counted(len(self.shards), 'file')}: "
            f"{in_bytes(n_copied)} copied as they are, {counted(len(self.jobs), 'tensor')} changed"
        )
        yield from rows.lines(width, everything=everything)
        for sentence in sentences:
            yield from wrapped(sentence, width)


def plan_merge(
    base: str | Path | Checkpoint, adapters: Sequence[Given], options: MergeOptions | None = None
) -> MergePlan:
    """Plan a merge; reads headers and adapters, writes nothing.

    Args:
        base: Folder of the base, or the base as opened.
        adapters: Paths of adapters, adapters as values, or `WeightedAdapter`s.
        options: Options of the merge; None for the defaults.

    Returns:
        The plan.

    Raises:
        CheckpointError: The base cannot be read or is quantized, an adapter is not finite, or any
            of its tensors has no place.
    """
    options = options or MergeOptions()
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    if options.dequantize is not None or options.requantize:
        checkpoint = unpacked(checkpoint, options.dequantize)
    weighted = weighted_adapters(adapters, checkpoint)
    check_adapters(weighted)
    check_rename(weighted, options.rename)
    _check_ties(checkpoint, options.tie or {})
    of = BaseClass(checkpoint, options.tie)
    jobs: dict[str, TensorJob] = {}  # by the name of the output tensor
    for adapter in weighted:
        place_adapter(adapter, of, options, jobs)
    changes = _Changes(of, options, jobs)
    changes.untie()
    changes.change_dtype()
    for job in jobs.values():
        _check_job(job)
    changes.grow_vocabulary()
    shards, notes = lay_out(checkpoint, jobs), changes.notes
    side_files, left_out = _side_files(checkpoint, options)
    return MergePlan(
        checkpoint,
        tuple(weighted),
        options,
        shards,
        changes.config,
        _new_index(checkpoint, shards),
        side_files,
        (*notes, *left_out),
    )


def _side_files(base: Checkpoint, options: MergeOptions) -> tuple[tuple[str, ...], list[str]]:
    """Return the other files to copy, and notes on those that are left out."""
    if base.lone:
        return (), []
    found = find_side_files(base.folder)
    taken = [*found.belong, *(found.code if options.copy_code else ())]
    left = [name for name in found.left if name not in {*base.shards, base.index_name}]
    notes = []
    if options.dequantize is not None:
        taken = [name for name in taken if name not in QUANTIZED_FILES]
    if found.code and not options.copy_code:
        notes.append(f"code is copied on request only: {', '.join(found.code)}")
    if left:
        notes.append(f"left out: {', '.join(map(repr, left))}")
    return tuple(sorted(taken)), notes


def _check_ties(checkpoint: Checkpoint, given_ties: Mapping[str, str]) -> None:
    """Refuse ties of which the files hold both tensors, or not the one that is said to be there."""
    for absent, stored in given_ties.items():
        problem = f"the files hold '{absent}'" if absent in checkpoint.tensors else ""
        if stored not in checkpoint.tensors:
            problem = f"the files lack '{stored}'"
        if problem:
            remedy = "Name a tensor that the files lack, and the one in them that it equals"
            raise CheckpointError(f"tie '{absent}' to '{stored}'", problem, remedy)


def _new_index(checkpoint: Checkpoint, shards: Sequence[OutputShard]) -> bytes | None:
    """Return the index of a changed layout; None if the base's own index is still right."""
    if checkpoint.index is None or all(shard.same_layout for shard in shards):
        return None
    files = {name: shard.name for shard in shards for name in shard.header.tensors}
    order = [name for name in checkpoint.index["weight_map"] if name in files]
    entries = [entry for shard in shards for entry in shard.header.tensors.values()]
    metadata = dict(checkpoint.index.get("metadata") or {})
    metadata["total_size"] = sum(entry.n_bytes for entry in entries)
    if "total_parameters" in metadata:
        wide = [entry for entry in entries if DTYPE_BITS[entry.dtype] >= 16]
        metadata["total_parameters"] = sum(entry.n_elements for entry in wide)
    weight_map = {name: files[name] for name in (*order, *files)}
    index = {**checkpoint.index, "weight_map": weight_map, "metadata": metadata}
    return _json(index)


def _json(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()


# What follows from the updates ------------------------------------------------------------------


@dataclass
class _Changes:
    """The jobs of a merge, to which each method adds what follows from them."""

    of: BaseClass
    options: MergeOptions
    jobs: dict[str, TensorJob]  # by the name of the output tensor
    config: dict[str, Any] = field(default_factory=dict)  # keys of `config.json` that change
    notes: list[str] = field(default_factory=list)  # for the user

    def __post_init__(self) -> None:
        self.checkpoint = self.of.checkpoint
        said = self.checkpoint.config
        self.tables = [said, *(value for value in said.values() if isinstance(value, dict))]

    def _add(self, name: str, source: str) -> TensorJob:
        entry = self.checkpoint.tensors[source]
        self.jobs[name] = TensorJob.of(self.checkpoint, name, entry)
        return self.jobs[name]

    def untie(self) -> None:
        """Write every tensor of a cut tie separately.

        A tie is cut if some of its tensors change and the others would not: then all are written,
        as one setting of the config covers all ties of a class.
        """
        # Replaced rows are the exception: PEFT writes them into the tied head, too.
        touched = {name for name, job in self.jobs.items() if job.placed or not job.rows}
        if not any(_may_be_tied(self.jobs[name]) for name in touched):
            return
        cut = [group for group in self.of.ties if touched & group and not self._stays(group)]
        for group in cut:
            if stuck := touched & group & self.of.inseparable:
                classes = self.checkpoint.config.get("architectures") or ["of the base"]
                raise CheckpointError(
                    f"merge into '{min(stuck)}'",
                    "other layers share its tensor, and the class "
                    f"{classes[0]} cannot load them apart",
                    "Adapt other layers, or keep this adapter unmerged",
                )
        for group in self.of.ties:
            absent = sorted(group - self.checkpoint.tensors.keys())
            if group <= self.jobs.keys() and (not cut or group <= self.of.inseparable):
                for name in absent:  # the same values under each name: one is enough
                    del self.jobs[name]
            for name in absent if cut else ():
                self._store_apart(name)
        if not cut:
            return
        untied = [job.name for job in self.jobs.values() if job.source and not job.stored]
        self.notes += [f"'{name}' was tied and becomes a separate tensor" for name in untied]
        if self.checkpoint.config:
            self.config |= UNTIED

    def _stays(self, group: frozenset[str]) -> bool:
        """Whether a tie holds after the merge."""
        mine = [self.jobs[name] for name in sorted(group) if name in self.jobs]
        first = mine[0]
        if len(mine) == 1 and first.grows and first.base_copy is None:
            self.notes.append(f"'{first.name}' grew and stays tied to the head")
            return True
        return len(mine) == len(group) and all(_same_copies(first, job) for job in mine)

    def _store_apart(self, name: str) -> None:
        """Add a tensor that the files lack, with the values of the one that it is tied to."""
        source = self.of.source_of(name)
        if source is None or name in self.jobs or name in self.of.inseparable:
            return
        job, changed = self._add(name, source), self.jobs.get(source)
        if changed is not None and changed.rows:
            problem = f"its rows are replaced, and it is parted from '{name}', its tied head"
            raise clash(source, problem)
        if changed is not None and changed.base_copy is not None:
            job.base_copy, job.shape = changed.base_copy, tuple(changed.base_copy.shape)

    def change_dtype(self) -> None:
        """Write every quantized tensor as floats, and every float tensor in a dtype, as asked."""
        packed = self.checkpoint.packed if self.options.dequantize is not None else {}
        dtype = FORMAT_DTYPES.get(self.options.dtype or "")
        for entry in self.checkpoint:  # in their order: whoever plans again makes the same files
            is_cast = dtype is not None and entry.dtype in FLOATS and entry.dtype != dtype
            if entry.name not in self.jobs and (is_cast or entry.name in packed):
                self._add(entry.name, entry.name)
        if self.options.dequantize is not None and "quantization_config" in self.checkpoint.config:
            self.config["quantization_config"] = None
        if dtype is None:
            return
        for job in self.jobs.values():
            job.dtype = dtype if job.dtype in FLOATS else job.dtype
        if self.checkpoint.config:
            keys = {
                key for table in self.tables for key in ("dtype", "torch_dtype") if key in table
            }
            self.config |= dict.fromkeys(sorted(keys) or ["torch_dtype"], self.options.dtype)

    def grow_vocabulary(self) -> None:
        """Refuse a grown embedding whose head did not grow, and note the new size."""
        tensors = self.checkpoint.tensors
        for name, job in self.jobs.items():
            if job.source is None or not job.grows:
                continue
            rows, old = job.shape[0], job.source.shape[0]
            ends = self.of.ends if self.of.known else frozenset()
            for other in sorted(ends & tensors.keys()):
                shape = self.jobs.get(other, tensors[other]).shape
                if tensors[other].shape[0] == old and shape[0] != rows:
                    raise clash(name, f"it grows to {rows} rows and '{other}' stays at {old}")
            if any(table.get("vocab_size") == old for table in self.tables):
                self.config["vocab_size"] = {old: rows}
            self.notes.append(f"'{name}' grows from {old} to {rows} rows")


def _may_be_tied(job: TensorJob) -> bool:
    """Whether an update may concern a tie; only then is the class built, which takes seconds.

    Not if each of several layers has a tensor of its own there: all 350 classes of transformers
    5.24 that tie tensors of two modules were looked at, whichever of the names a file has.
    """
    is_embedding = any(t.spec.kind == "embedding" for p in job.placed for t in p.terms)
    return not job.stored or is_embedding or not job.base.in_every_layer(job.name)


def _same_copies(one: TensorJob, other: TensorJob) -> bool:
    """Whether two tensors are replaced by the same values."""
    if any(job.placed or job.added or job.rows or not job.trained for job in (one, other)):
        return False
    if len(one.trained) != len(other.trained):
        return False
    pairs = zip(one.trained, other.trained, strict=True)
    return all(w == v and torch.equal(t, u) for (t, w), (u, v) in pairs)


# What cannot be done to a tensor ----------------------------------------------------------------


def _check_job(job: TensorJob) -> None:
    """Refuse updates that exclude each other, or whose tensor is not of floats."""
    if job.packed is None and job.action != "cast":
        _check_plain(job)
    if job.packed is not None and job.again:
        problem = "" if job.packed.written else f"quantizing to {job.dtype} is not supported"
        if job.grows or not job.stored:
            problem = "it is quantized, and would grow or become a separate tensor"
        if problem:
            remedy = 'Write plain floats: pass dequantize="bfloat16"'
            raise CheckpointError(f"merge into '{job.name}'", problem, remedy)
    problem = _clash_of_copies(job) or _clash_of_updates(job)
    if problem:
        raise clash(job.name, problem, job.adapters)


def _check_plain(job: TensorJob) -> None:
    asked, source = f"merge into '{job.base.folder}'", job.source
    is_float = source is None or source.dtype in FLOATS
    names = [job.name] if source is None or is_float else [source.name, job.name]
    if quantized := why_no_update(job.base, names):
        raise CheckpointError(asked, *quantized)
    if source is not None and not is_float:
        problem = f"'{job.name}' has the dtype {source.dtype}"
        raise CheckpointError(asked, problem, "Only floating point weights take an update")


def _clash_of_copies(job: TensorJob) -> str:
    """Return what full values of one tensor cannot do together, or ""."""
    if not job.trained:
        return ""
    if job.placed and job.grows:
        return "one adapter makes it grow and another updates it"
    total = sum(weight for _, weight in job.trained)
    if (job.grows or not job.source) and not math.isclose(total, 1):
        return "only a part of its rows is in the base, so a weight other than 1 means nothing"
    shapes = {tuple(values.shape) for values, _ in job.trained}
    if len(shapes) > 1:
        return "the adapters' values have different shapes"
    if not job.source and len(job.trained) > 1:
        return "the base lacks it and several adapters add it"
    return "two adapters need different shapes of it" if shapes != {job.shape} else ""


def _clash_of_updates(job: TensorJob) -> str:
    """Return what updates of one tensor cannot do together, or ""."""
    for placed in job.placed:  # a gain is right for one whole update
        shared = len(job.placed) > 1 or job.rows or job.trained
        if placed.gain is not None and (placed.terms[0].weight != 1 or shared):
            return "DoRA's update cannot be mixed with others or weighted"
    if len({placed.n_cols for placed in job.placed}) > 1:
        return "two sites see it as different matrices"
    rows = [index for indices, _ in job.rows for index in indices]
    if len(set(rows)) < len(rows) or (rows and job.trained):
        return "the same row is replaced twice"
    return ""
