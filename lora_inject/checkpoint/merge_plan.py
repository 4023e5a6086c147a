"""Plan a merge in full, before anything is written.

Planning reads only headers and adapters, and lays every output file out to the byte. Every error
that can be known in advance is raised here; only errors of the disk and of rounding come later.

From the updates changes follow: ties are cut, tensors are dequantized or cast, a vocabulary grows.
Each may change `config.json`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_inject.checkpoint.base_class import UNTIED, BaseClass
from lora_inject.checkpoint.choose import Fit, choose
from lora_inject.checkpoint.index import (
    QUANTIZED_FILES,
    Checkpoint,
    edit_config,
    find_side_files,
    resolve_inside,
)
from lora_inject.checkpoint.merge_inputs import (
    Given,
    MergeOptions,
    WeightedAdapter,
    check_adapters,
    weighted_adapters,
)
from lora_inject.checkpoint.output_files import (
    OutputShard,
    TensorJob,
    clash,
    header_digest,
    lay_out,
)
from lora_inject.checkpoint.packed import Packed
from lora_inject.checkpoint.place import Placed
from lora_inject.checkpoint.quantized_base import FORMAT_DTYPES, unpacked, why_no_update
from lora_inject.core.files.safetensors_file import DTYPE_BITS, FLOATS
from lora_inject.core.functional.merge_report import MergeReport, TensorReport
from lora_inject.core.spec.names import counted
from lora_inject.core.spec.tables import Listing, in_bytes, sides, wrapped
from lora_inject.errors import CheckpointError
from lora_inject.formats.model_facts import is_transformers_4


@dataclass(frozen=True)
class MergePlan:
    """Everything that a merge will do.

    Attributes:
        base: The checkpoint that is read.
        adapters: The adapters.
        options: Options of the merge.
        shards: The output's weight files, in the order of the base's.
        rules: How each adapter's names were read.
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
    rules: tuple[str, ...]
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
        base, changes = self.base, self.config_changes
        copied = [*self.side_files, *([base.index_name] if base.index_name else ())]
        copied += ["config.json"] if base.config else []
        files = {name: resolve_inside(base.folder, name).read_bytes() for name in copied}
        if base.index_name is not None and self.index is not None:
            files[base.index_name] = self.index
        if base.config and changes:
            files["config.json"] = edit_config(base.config, changes)
        return files

    @property
    def digest(self) -> str:
        """SHA-256 of everything that determines the output, except adapters' values."""
        shards = [
            (s.name, header_digest(s.header), [(j.name, j.action, sorted(j.sites)) for j in s.jobs])
            for s in self.shards
        ]
        facts = [shards, dict(self.config_changes), list(self.side_files)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, for printing and for machines."""
        adapters = [
            {"label": a.label, "weight": a.weight, "sites": len(a.state.sites), "names": rule}
            for a, rule in zip(self.adapters, self.rules, strict=True)
        ]
        shards = [
            {
                "name": shard.name,
                "bytes": shard.n_bytes,
                "new": shard.base is None,
                "same_layout": shard.same_layout,
                "copied_bytes": sum(copy.n_bytes for copy in shard.copies),
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

    def text(self, width: int = 80, *, everything: bool = False) -> str:
        """Return what a merge would do; tensors of one kind share a line unless `everything`."""
        cells = [(job.name, job.action, job.dtype, sides(job.shape)) for job in self.jobs]
        rows = Listing(("tensor", "action", "dtype", "shape"), tuple(cells))
        sentences = [
            f"{a.label} x {a.weight:g}: {counted(len(a.state.sites), 'site')}, {rule}"
            for a, rule in zip(self.adapters, self.rules, strict=True)
        ]
        for key, value in self.config_changes.items():
            new = next(iter(value.values())) if isinstance(value, dict) else value
            sentences.append(f"config.json: {key} becomes {json.dumps(new)}")
        n_copied = sum(copy.n_bytes for shard in self.shards for copy in shard.copies)
        sentences += [f"note: {note}" for note in self.notes]
        sentences.append(
            f"would write {in_bytes(self.n_bytes)} in {counted(len(self.shards), 'file')}: "
            f"{in_bytes(n_copied)} copied as they are, {counted(len(self.jobs), 'tensor')} changed"
        )
        lines = [*rows.lines(width, everything=everything)]
        return "\n".join([*lines, *(part for each in sentences for part in wrapped(each, width))])


def _check_ties(checkpoint: Checkpoint, given_ties: Mapping[str, str]) -> None:
    """Refuse ties of which the files hold both tensors, or not the one that is said to be there."""
    for absent, stored in given_ties.items():
        problem = f"the files hold '{absent}'" if absent in checkpoint.tensors else ""
        if stored not in checkpoint.tensors:
            problem = f"the files lack '{stored}'"
        if problem:
            remedy = "Name a tensor that the files lack, and the one in them that it equals"
            raise CheckpointError(f"tie '{absent}' to '{stored}'", problem, remedy)


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
    _check_ties(checkpoint, options.tie or {})
    of = BaseClass(checkpoint, options.tie)
    fits = [choose(adapter, of, options) for adapter in weighted]
    settled = _Settled(of, options, _joined(fits))
    shards, notes = lay_out(checkpoint, settled.jobs), list(settled.notes)
    side_files, code_left = find_side_files(checkpoint, code=options.copy_code)
    if options.dequantize is not None:
        side_files = tuple(name for name in side_files if name not in QUANTIZED_FILES)
    if code_left:
        notes.append(f"code is copied on request only: {', '.join(code_left)}")
    return MergePlan(
        checkpoint,
        tuple(weighted),
        options,
        shards,
        tuple(fit.label for fit in fits),
        settled.config_changes,
        _new_index(checkpoint, shards),
        side_files,
        tuple(notes),
    )


def _joined(fits: Sequence[Fit]) -> dict[str, TensorJob]:
    """Return the jobs of all adapters, by output tensor."""
    jobs: dict[str, TensorJob] = {}
    for fit in fits:
        for name, source, copy in fit.grown_copies():
            job = fit.job(name, source)
            job.shape, job.base_copy = tuple(copy.shape), copy
        for name, job in fit.jobs.items():
            if sum(map(bool, (job.placed, job.added, job.trained, job.rows))) > 1:
                raise clash(name, f"{fit.adapter.label} holds values of it and an update as well")
            job.adapters = (fit.adapter.label,)
            jobs[name] = jobs[name].joined(job) if name in jobs else job
    return jobs


def _new_index(checkpoint: Checkpoint, shards: Sequence[OutputShard]) -> bytes | None:
    """Return the index of a changed layout; None if the base's own index is still right."""
    if checkpoint.index is None or all(shard.same_layout for shard in shards):
        return None
    files = {name: shard.name for shard in shards for name in shard.header.tensors}
    order = [name for name in checkpoint.index["weight_map"] if name in files]
    index = dict(checkpoint.index)
    index["weight_map"] = {name: files[name] for name in (*order, *files)}
    index["metadata"] = _new_metadata(dict(index.get("metadata") or {}), shards)
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def _new_metadata(metadata: dict[str, Any], shards: Sequence[OutputShard]) -> dict[str, Any]:
    """Return the metadata of an index with the sizes of the output."""
    entries = [entry for shard in shards for entry in shard.header.tensors.values()]
    metadata["total_size"] = sum(entry.n_bytes for entry in entries)
    if "total_parameters" in metadata:
        parameters = [entry for entry in entries if DTYPE_BITS[entry.dtype] >= 16]
        metadata["total_parameters"] = sum(entry.n_elements for entry in parameters)
    return metadata


# What follows from the updates ------------------------------------------------------------------


@dataclass
class _Settled:
    """The jobs of a merge, with further jobs that follow from them."""

    of: BaseClass  # the class of the base
    options: MergeOptions  # how to merge
    jobs: dict[str, TensorJob]  # by the name of the output tensor; extended in place
    config_changes: dict[str, Any] = field(default_factory=dict)  # keys of `config.json`
    notes: list[str] = field(default_factory=list)  # for the user

    def __post_init__(self) -> None:
        """Run the steps in order: later steps see the jobs of earlier ones."""
        self.checkpoint = self.of.checkpoint
        config = dict(self.checkpoint.config)
        self._tables = [config, *(value for value in config.values() if isinstance(value, dict))]
        self._dequantize()
        self._untie()
        self._change_dtype()
        for job in self.jobs.values():
            _check_job(self.checkpoint, job)
        self._grow_vocabulary()

    def _add(self, name: str, source: str, reason: str = "") -> TensorJob:
        entry = self.checkpoint.tensors[source]
        self.jobs[name] = TensorJob.of(self.checkpoint, name, entry, reason)
        return self.jobs[name]

    def _dequantize(self) -> None:
        """Write every tensor that is shown dequantized."""
        if self.options.dequantize is None:
            return
        for name in self.checkpoint.packed:
            if name not in self.jobs:
                self._add(name, name, "dequantized")
        if "quantization_config" in self.checkpoint.config:
            self.config_changes["quantization_config"] = None

    def _untie(self) -> None:
        """Write every tensor of a cut tie separately.

        A tie is cut if some of its tensors change and the others would not: then all are written.
        """
        touched = self._touched()
        if not touched:
            return
        cut = [group for group in self.of.ties if touched & group and not self._stays(group)]
        if not cut:
            return
        self._check_separable(touched, cut)
        self._check_loads_apart(cut[0])
        self._store_apart()
        untied = [job.name for job in self.jobs.values() if job.source and not job.stored]
        self.notes += [f"'{name}' was tied and becomes a separate tensor" for name in untied]
        if self.checkpoint.config:
            self.config_changes |= UNTIED

    def _touched(self) -> set[str]:
        """Return the tensors whose change may cut a tie; none if no tie can be concerned."""
        # Replaced rows are the exception: PEFT writes them into the tied head, too.
        touched = {name for name, job in self.jobs.items() if job.placed or not job.rows}
        may_cut = any(_may_be_tied(self.jobs[name]) for name in touched)
        return touched if may_cut else set()

    def _check_separable(self, touched: set[str], cut: Iterable[frozenset[str]]) -> None:
        """Refuse to cut a tie whose tensors the class of the base cannot load apart."""
        for group in cut:
            if stuck := touched & group & self.of.inseparable:
                classes = self.checkpoint.config.get("architectures") or ["of the base"]
                raise CheckpointError(
                    f"merge into '{min(stuck)}'",
                    "other layers share its tensor, and the class "
                    f"{classes[0]} cannot load them apart",
                    "Adapt other layers, or keep this adapter unmerged",
                )

    def _check_loads_apart(self, group: frozenset[str]) -> None:
        """Raise if a class whose config says that its ends are apart would not load them right.

        On transformers 4 the same entry scales the outputs of T5, and leaves the embeddings of
        Bart's encoder and decoder without values.
        """
        if self.of.known and is_transformers_4() and self.of.model.config.is_encoder_decoder:
            raise CheckpointError(
                f"merge into '{min(group)}'",
                "it is tied, and transformers 4 cannot load the ends of an encoder-decoder apart",
                "Upgrade transformers to 5, adapt other layers, or keep this adapter unmerged",
            )

    def _stays(self, group: frozenset[str]) -> bool:
        """Whether a tie holds after the merge; then its other names stay out of the files."""
        mine = [self.jobs[name] for name in sorted(group) if name in self.jobs]
        if not mine:
            return True
        first = mine[0]
        if len(mine) == 1 and first.grows and first.base_copy is None:
            self.notes.append(f"'{first.name}' grew and stays tied to the head")
            return True
        if len(mine) < len(group) or not all(_same_copies(first, job) for job in mine):
            return False
        for name in group - self.checkpoint.tensors.keys():
            del self.jobs[name]
        return True

    def _store_apart(self) -> None:
        """Add tensors that the files lack: one setting of the config covers all ties of a class."""
        for group in self.of.ties:
            for name in sorted(group - self.jobs.keys() - self.checkpoint.tensors.keys()):
                source = self.of.source_of(name)
                if source is None or name in self.of.inseparable:
                    continue
                job, changed = self._add(name, source), self.jobs.get(source)
                if changed is not None and changed.rows:
                    problem = (
                        f"its rows are replaced, and it is parted from '{name}', its tied head"
                    )
                    raise clash(source, problem)
                if changed is not None and changed.base_copy is not None:
                    job.base_copy, job.shape = changed.base_copy, tuple(changed.base_copy.shape)

    def _change_dtype(self) -> None:
        """Cast every float tensor if another dtype was asked for."""
        if self.options.dtype is None:
            return
        dtype = FORMAT_DTYPES[self.options.dtype]
        for entry in self.checkpoint:
            if entry.name not in self.jobs and entry.dtype in FLOATS and entry.dtype != dtype:
                self._add(entry.name, entry.name, "cast")
        for job in self.jobs.values():
            if job.dtype in FLOATS:
                job.dtype = dtype
        if self.checkpoint.config:
            self.config_changes |= dict.fromkeys(self._dtype_keys(), self.options.dtype)

    def _dtype_keys(self) -> list[str]:
        """Return the keys under which the config has its dtype; the usual one if it has none."""
        keys = [key for table in self._tables for key in ("dtype", "torch_dtype") if key in table]
        return keys or ["torch_dtype"]

    def _grow_vocabulary(self) -> None:
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
            if any(table.get("vocab_size") == old for table in self._tables):
                self.config_changes["vocab_size"] = {old: rows}
            self.notes.append(f"'{name}' grows from {old} to {rows} rows")


def _may_be_tied(job: TensorJob) -> bool:
    """Whether an update may concern a tie; only then is the class built.

    Ties join embeddings, heads and whole stacks of layers. So an update counts if its site is an
    embedding, its tensor is not in the files, or its name has no layer number.
    """
    numbered = any(map(str.isdigit, job.name.split(".")))
    is_embedding = any(t.spec.kind == "embedding" for p in job.placed for t in p.terms)
    return not job.stored or is_embedding or (len(job.shape) > 1 and not numbered)


def _check_job(checkpoint: Checkpoint, job: TensorJob) -> None:
    """Refuse updates that exclude each other, or whose tensor is not of floats."""
    if job.packed is None and job.reason != "cast":
        _check_plain(checkpoint, job)
    if job.packed is not None and job.again:
        _check_requantized(job.name, job, job.packed)
    for problem, holds in _clashes(job).items():
        if holds:
            raise clash(job.name, problem, job.adapters)


def _check_requantized(name: str, job: TensorJob, packed: Packed) -> None:
    """Refuse to quantize a tensor again in a format, or of a size, that cannot be written."""
    if job.grows or not job.stored:
        problem = "it is quantized, and would grow or become a separate tensor"
    elif not packed.written:
        problem = f"quantizing to {job.dtype} is not supported"
    else:
        return
    remedy = 'Write plain floats: pass dequantize="bfloat16"'
    raise CheckpointError(f"merge into '{name}'", problem, remedy)


def _clashes(job: TensorJob) -> dict[str, bool]:
    """Return what updates of one tensor cannot do together, and whether these do."""
    n_copies = len(job.trained)
    shapes = {tuple(values.shape) for values, _ in job.trained}
    rows = [index for indices, _ in job.rows for index in indices]
    return {
        "DoRA's update cannot be mixed with others or weighted": _mixes_gain(job),
        "one adapter makes it grow and another updates it": bool(
            job.placed and n_copies and job.grows
        ),
        "only a part of its rows is in the base, so a weight other than 1 means nothing": bool(
            n_copies and (job.grows or not job.source)
        )
        and not math.isclose(sum(weight for _, weight in job.trained), 1),
        "the adapters' values have different shapes": len(shapes) > 1,
        "the base lacks it and several adapters add it": not job.source and n_copies > 1,
        "two adapters need different shapes of it": bool(shapes - {job.shape}),
        "two sites adapt rows of it that overlap": _overlap(job.placed),
        "the same row is replaced twice": len(set(rows)) < len(rows) or bool(rows and n_copies),
    }


def _mixes_gain(job: TensorJob) -> bool:
    """Whether a gain, which is right for one whole update, meets another or a weight."""
    places = Counter((placed.start, placed.stop) for placed in job.placed)
    for placed in job.placed:
        if placed.gain is not None:
            shared = places[placed.start, placed.stop] > 1
            if shared or job.rows or job.trained:
                return True
            if any(abs(term.weight) != 1 for term in placed.terms):
                return True
    return False


def _overlap(placed: Sequence[Placed]) -> bool:
    """Whether updates share some of their rows but not all, or see the tensor as other matrices."""
    spans = sorted({(one.start, one.stop) for one in placed})
    if any(first[1] > second[0] for first, second in itertools.pairwise(spans)):
        return True
    return len({one.n_cols for one in placed}) > 1


def _check_plain(checkpoint: Checkpoint, job: TensorJob) -> None:
    asked, source = f"merge into '{checkpoint.folder}'", job.source
    is_float = source is None or source.dtype in FLOATS
    names = [job.name] if source is None or is_float else [source.name, job.name]
    if quantized := why_no_update(checkpoint, names):
        raise CheckpointError(asked, *quantized)
    if source is not None and not is_float:
        problem = f"'{job.name}' has the dtype {source.dtype}"
        raise CheckpointError(asked, problem, "Only floating point weights take an update")


def _same_copies(one: TensorJob, other: TensorJob) -> bool:
    """Whether two tensors are replaced by the same values."""
    if any(job.placed or job.added or job.rows or not job.trained for job in (one, other)):
        return False
    if len(one.trained) != len(other.trained):
        return False
    pairs = zip(one.trained, other.trained, strict=True)
    return all(w == v and torch.equal(t, u) for (t, w), (u, v) in pairs)


@dataclass(frozen=True, repr=False, kw_only=True)
class MergedFiles(MergeReport):
    """What `merge_checkpoint` did; `n_tensors` counts those that were copied too.

    Attributes:
        output: The folder that was written.
        n_bytes: Size of all weight files.
        resumed: Weight files that an earlier run had finished.
        verified: Whether the output was verified before it was published.
        seconds: From the plan to the end.
        fsync_seconds: The part of it that was waiting for the disk.
        peak_memory_bytes: Most memory that the process ever held, None where unknown.
    """

    output: Path
    n_bytes: int
    resumed: tuple[str, ...]
    verified: bool
    seconds: float
    fsync_seconds: float
    peak_memory_bytes: int | None

    def totals(self) -> str:
        """Return what was written, how large it is and how long it took."""
        resumed = f"; {counted(len(self.resumed), 'file')} finished earlier" if self.resumed else ""
        peak = self.peak_memory_bytes
        memory = f", {in_bytes(peak)} of memory" if peak else ""
        checked = ", verified" if self.verified else ""
        lost = f"; {self.warning}" if self.warning else ""
        return (
            f"merged {len(self.tensors):,} of {self.n_tensors:,} tensors into {self.output}: "
            f"{in_bytes(self.n_bytes)} in {self.seconds:.1f} s{memory}{checked}{resumed}{lost}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**super().to_dict(), "output": str(self.output), "resumed": list(self.resumed)}


def tensor_report(data: Mapping[str, Any]) -> TensorReport:
    """Return the report that its `to_dict` gave as plain data."""
    return TensorReport(
        **{**data, "shape": tuple(data["shape"]), "sites": tuple(data["sites"])},
    )
