"""What a merge will do, in full, before it does anything.

Planning reads headers and adapters only, and ends with every output file laid out to the
byte. Every refusal that can be known beforehand happens here; what remains for later is the disk
and the rounding. The plan is also what a rerun must agree with, and what verification re-derives.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_inject.checkpoint.adapter_files import Given, weighted_adapter
from lora_inject.checkpoint.base_class import UNTIED, BaseClass
from lora_inject.checkpoint.choose import Fit, choose
from lora_inject.checkpoint.dequantized import dequantized
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.options import MergeOptions
from lora_inject.checkpoint.output_files import FLOATS, OutputShard, TensorJob, lay_out
from lora_inject.checkpoint.quantized import why_not
from lora_inject.checkpoint.same_base import check_same_base, grown_copies
from lora_inject.checkpoint.side_files import edit_config, find_side_files, read_side_file
from lora_inject.checkpoint.weighted_adapter import WeightedAdapter, check_adapters
from lora_inject.errors import CheckpointError
from lora_inject.storage.safetensors_file import DTYPE_BITS, TensorEntry


@dataclass(frozen=True)
class MergePlan:
    """Everything that a merge will do.

    Attributes:
        base: The checkpoint that is read.
        adapters: The adapters.
        options: How.
        shards: The output's weight files, in the order of the base's.
        rules: How each adapter's names were read, by its label.
        config_changes: Keys of `config.json` that change.
        index: New content of the index, None where it is copied or there is none.
        side_files: Other files that come along.
        notes: What a reader should know.
    """

    base: Checkpoint
    adapters: tuple[WeightedAdapter, ...]
    options: MergeOptions
    shards: tuple[OutputShard, ...]
    rules: tuple[tuple[str, str], ...]
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

    @property
    def config(self) -> bytes | None:
        """New content of `config.json`, None where it is copied or there is none."""
        return edit_config(self.base.config, self.config_changes) if self.config_changes else None

    def other_files(self) -> dict[str, bytes]:
        """Return the content of every file of the output but the weight files."""
        base = self.base
        files = {name: read_side_file(base.folder, name) for name in self.side_files}
        if base.index_name is not None:
            files[base.index_name] = self.index or read_side_file(base.folder, base.index_name)
        if base.config:
            files["config.json"] = self.config or read_side_file(base.folder, "config.json")
        return files

    @property
    def digest(self) -> str:
        """SHA-256 of what the output will be made of, adapters' values apart."""
        shards = [
            (s.name, s.header.digest, [(j.name, j.action, sorted(j.sites)) for j in s.jobs])
            for s in self.shards
        ]
        facts = [shards, dict(self.config_changes), list(self.side_files)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, for printing and for machines."""
        adapters = [
            {"label": a.label, "weight": a.weight, "sites": len(a.state.sites), "names": rule}
            for a, (_, rule) in zip(self.adapters, self.rules, strict=True)
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


def plan_merge(
    base: str | Path | Checkpoint,
    adapters: Sequence[Given],
    options: MergeOptions | None = None,
) -> MergePlan:
    """Plan a merge; reads headers and adapters, writes nothing.

    Args:
        base: Folder of the base, or the base as opened.
        adapters: Paths of adapters, adapters as values, or `WeightedAdapter`s.
        options: How; the defaults where None.

    Returns:
        The plan.

    Raises:
        CheckpointError: The base cannot be read or is quantized, an adapter is not finite, or any
            of its tensors has no place.
    """
    options = options or MergeOptions()
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    if options.dequantize is not None:
        checkpoint = dequantized(checkpoint, options.dequantize)
    weighted = [weighted_adapter(adapter, checkpoint) for adapter in adapters]
    check_adapters(weighted)
    builder = _Builder(checkpoint, options)
    fits = [choose(adapter, checkpoint, options, builder.of) for adapter in weighted]
    for adapter, fit in zip(weighted, fits, strict=True):
        if not options.any_base:
            check_same_base(checkpoint, adapter, fit)
        builder.take(adapter, fit)
    builder.dequantize()
    builder.untie()
    builder.change_dtype()
    builder.check()
    shards = builder.shards()
    side_files: tuple[str, ...] = ()
    if checkpoint.config or checkpoint.index_name or len(list(checkpoint.folder.iterdir())) > 1:
        side_files, code_left = find_side_files(checkpoint.folder, code=options.copy_code)
        if code_left:
            builder.notes.append(f"code stays behind: {', '.join(code_left)}")
    return MergePlan(
        checkpoint,
        tuple(weighted),
        options,
        shards,
        tuple((a.label, fit.label) for a, fit in zip(weighted, fits, strict=True)),
        builder.config_changes,
        _new_index(checkpoint, shards),
        side_files,
        tuple(builder.notes),
    )


class _Builder:
    """Gathers jobs from adapters, then settles what they imply for the rest of the checkpoint."""

    def __init__(self, checkpoint: Checkpoint, options: MergeOptions) -> None:
        self.checkpoint, self.options = checkpoint, options
        self.of = BaseClass(checkpoint, options.tie)
        self.jobs: dict[str, TensorJob] = {}
        self.config_changes: dict[str, Any] = {}
        self.notes: list[str] = []

    def take(self, adapter: WeightedAdapter, fit: Fit) -> None:
        """Add one adapter's updates."""
        tensors, weight = self.checkpoint.tensors, adapter.weight
        for site, places in fit.placed.items():
            for place in places:
                job = self._job(place.tensor, tensors[place.source.name], site)
                job.placed += (place,)
        for name, (entry, value) in fit.trained.items():
            job = self._job(name, entry, name)
            job.action = "replaced" if name in tensors else "added"
            job.shape = tuple(value.shape)
            job.trained += ((value, weight),)
        for name, (source, copy) in grown_copies(self.checkpoint, adapter, fit).items():
            job = self._job(name, source)
            if job.base_copy is not None:
                raise _clash(name, "two adapters bring their own copy of it")
            job.shape, job.base_copy = tuple(copy.shape), copy
        for name, (source, vector) in fit.added.items():
            self._job(name, source, name).added += ((vector, weight),)
        for name, (source, indices, rows) in fit.rows.items():
            job = self._job(name, source, name)
            if weight != 1:
                raise _clash(name, f"rows cannot be replaced with weight {weight}")
            job.rows += ((indices, rows),)
            job.action = job.action if job.placed else "replaced"

    def _job(self, name: str, entry: TensorEntry | None, site: str | None = None) -> TensorJob:
        """Return the job of an output tensor, made of one of the base's where it is new."""
        if name not in self.jobs:
            self.jobs[name] = self._new_job(name, entry)
        job = self.jobs[name]
        if site is not None and site not in job.sites:
            job.sites += (site,)
        return job

    def _new_job(self, name: str, entry: TensorEntry | None) -> TensorJob:
        if entry is None:  # of the dtype that most of the base's values have
            sizes = dict.fromkeys(FLOATS, 0)
            for other in self.checkpoint:
                if other.dtype in sizes:
                    sizes[other.dtype] += other.n_elements
            return TensorJob(name, None, None, max(sizes, key=lambda d: sizes[d]), (), "added")
        action = "folded" if name in self.checkpoint.tensors else "untied"
        shard, packed = self.checkpoint.shard_of[entry.name], self.checkpoint.packed.get(entry.name)
        return TensorJob(name, entry, shard, entry.dtype, entry.shape, action, packed=packed)

    def dequantize(self) -> None:
        """Add a job for every quantized tensor, where that was asked for."""
        packed = self.checkpoint.packed
        for name in packed:
            if name not in self.jobs:
                self._job(name, self.checkpoint.tensors[name]).action = "dequantized"
        if packed and "quantization_config" in self.checkpoint.config:
            self.config_changes["quantization_config"] = None

    def untie(self) -> None:
        """Give every tensor of a tie that is cut a place of its own in the files."""
        # Replaced rows are the exception: PEFT gives them to the tied head as well.
        touched = {name for name, job in self.jobs.items() if job.placed or not job.rows}
        if not self._may_be_tied(touched):
            return
        cut = [group for group in self.of.ties if touched & group and not self._stays(group)]
        if not cut:
            return
        for group in cut:
            if stuck := touched & group & self.of.inseparable:
                classes = self.checkpoint.config.get("architectures") or ["of the base"]
                raise CheckpointError(
                    f"merge into '{min(stuck)}'",
                    f"other layers share its tensor, and the class {classes[0]} cannot load them "
                    "apart",
                    "Adapt other layers, or keep this adapter unmerged",
                )
        self._store_apart()
        for name, job in self.jobs.items():
            if name not in self.checkpoint.tensors and job.source is not None:
                self.notes.append(f"'{name}' was tied and becomes a tensor of its own")
        if self.checkpoint.config:
            self.config_changes |= UNTIED

    def _store_apart(self) -> None:
        """Add what the files lack: one setting of the config speaks for all ties of a class."""
        for group in self.of.ties:
            for name in sorted(group - self.jobs.keys() - self.checkpoint.tensors.keys()):
                source = self.of.source_of(name)
                if source is None or name in self.of.inseparable:
                    continue
                job = self._job(name, self.checkpoint.tensors[source])
                changed = self.jobs.get(source)
                if changed is not None and changed.base_copy is not None:
                    job.base_copy, job.shape = changed.base_copy, tuple(changed.base_copy.shape)

    def _may_be_tied(self, touched: Collection[str]) -> bool:
        """Whether an update is of a kind that ties concern: only then the class is asked.

        Ties join embeddings, heads and whole stacks of layers: what the adapter says is an
        embedding, what the files lack, and weights outside of any numbered list of layers.
        """
        jobs = [self.jobs[name] for name in touched]
        return any(
            job.name not in self.checkpoint.tensors
            or any(term.spec.kind == "embedding" for place in job.placed for term in place.terms)
            or (len(job.shape) > 1 and not any(map(str.isdigit, job.name.split("."))))
            for job in jobs
        )

    def _stays(self, group: frozenset[str]) -> bool:
        """Whether a tie holds after the merge; then what the files lack stays left out."""
        mine = [self.jobs[name] for name in sorted(group) if name in self.jobs]
        if not mine:
            return True
        first = mine[0]
        grown = first.source is not None and first.shape != first.source.shape
        if len(mine) == 1 and grown and first.base_copy is None:
            self.notes.append(f"'{first.name}' grew and stays tied to the head")
            return True
        if len(mine) < len(group) or not all(_same_copies(first, job) for job in mine):
            return False
        for name in group - self.checkpoint.tensors.keys():
            del self.jobs[name]
        return True

    def change_dtype(self) -> None:
        """Add a cast for every float tensor, where another dtype was asked for."""
        dtype = self.options.format_dtype
        if dtype is None:
            return
        for entry in self.checkpoint:
            if entry.name not in self.jobs and entry.dtype in FLOATS and entry.dtype != dtype:
                self._job(entry.name, entry).action = "cast"
        for job in self.jobs.values():
            job.dtype = dtype if job.dtype in FLOATS else job.dtype
        config = self.checkpoint.config
        if config:
            tables = [config, *(v for v in config.values() if isinstance(v, dict))]
            keys = [k for k in ("dtype", "torch_dtype") if any(k in t for t in tables)]
            for key in keys or ["torch_dtype"]:
                self.config_changes[key] = self.options.dtype

    def check(self) -> None:
        """Refuse what no writer could carry out."""
        for name, job in self.jobs.items():
            if job.packed is None and job.action != "cast":
                self._check_plain(job)
            ranges = sorted({(p.start, p.stop) for p in job.placed})
            overlap = any(a[1] > b[0] for a, b in itertools.pairwise(ranges))
            rows = [index for indices, _ in job.rows for index in indices]
            kinds, copies = (job.trained, job.placed, job.added), len(job.trained)
            shapes = {tuple(t.shape) for t, _ in job.trained}
            gains = [(p.start, p.stop) for p in job.placed if p.gain is not None]
            scaled = any(abs(t.weight) != 1 for p in job.placed if p.gain for t in p.terms)
            mixed = any([(p.start, p.stop) for p in job.placed].count(at) > 1 for at in gains)
            clashes = {
                "DoRA's update cannot be mixed with others or weighted": scaled or mixed,
                "one adapter replaces it and another updates it": sum(map(bool, kinds)) > 1,
                "the adapters' values have different shapes": len(shapes) > 1,
                "the base lacks it and several adapters bring it": not job.source and copies > 1,
                "two adapters want different shapes of it": shapes - {job.shape},
                "two sites want rows of it that overlap": overlap
                or len({p.n_cols for p in job.placed}) > 1,
                "the same row is replaced twice": len(set(rows)) < len(rows) or (rows and copies),
            }
            for found, clash in clashes.items():
                if clash:
                    raise _clash(name, found)
        self._check_vocabulary()

    def _check_plain(self, job: TensorJob) -> None:
        """Refuse an update of what is not made of floats."""
        asked = f"merge into '{self.checkpoint.folder}'"
        source = job.source
        packed = source is not None and source.dtype not in FLOATS
        names = [source.name, job.name] if source is not None and packed else [job.name]
        if quantized := why_not(self.checkpoint, names):
            raise CheckpointError(asked, *quantized)
        if source is not None and packed:
            found = f"'{job.name}' has the dtype {source.dtype}"
            raise CheckpointError(asked, found, "Only floating point weights take an update")

    def _check_vocabulary(self) -> None:
        """Refuse a grown embedding whose head did not grow, and note the new size."""
        tensors, config = self.checkpoint.tensors, self.checkpoint.config
        for name, job in self.jobs.items():
            if job.source is None or job.shape == job.source.shape:
                continue
            rows, old = job.shape[0], job.source.shape[0]
            ends = self.of.ends if self.of.known else frozenset()
            for other in sorted(ends & tensors.keys()):
                shape = self.jobs.get(other, tensors[other]).shape
                if tensors[other].shape[0] == old and shape[0] != rows:
                    raise _clash(name, f"it grows to {rows} rows and '{other}' stays at {old}")
            tables = [config, *(v for v in config.values() if isinstance(v, dict))]
            if any(table.get("vocab_size") == old for table in tables):
                self.config_changes["vocab_size"] = rows
            self.notes.append(f"'{name}' grows from {old} to {rows} rows")

    def shards(self) -> tuple[OutputShard, ...]:
        """Lay out the output's files; what the base lacks goes behind it, in a file of its own."""
        checkpoint, alone = self.checkpoint, self.checkpoint.index_name is None
        added = [job for name, job in self.jobs.items() if name not in checkpoint.tensors]
        dropped = checkpoint.hidden - self.jobs.keys()
        shards = []
        for shard in checkpoint.shards.values():
            mine = [  # of another name than what they are stored as
                job
                for name, job in self.jobs.items()
                if name in checkpoint.packed
                and job.source_shard == shard.name
                and name not in shard.header.tensors
            ]
            more = [*mine, *(added if alone else ())]
            shards.append(lay_out(shard.name, shard, self.jobs, more, dropped))
        if added and not alone:
            name = f"{checkpoint.stem}-added.safetensors"
            while name in checkpoint.shards:
                name = name.replace("-added", "-added-added", 1)
            shards.append(lay_out(name, None, {}, added))
        return tuple(shards)


def _clash(name: str, found: str) -> CheckpointError:
    remedy = "Merge one adapter after the other, or leave one out"
    return CheckpointError(f"merge into '{name}'", found, remedy)


def _same_copies(one: TensorJob, other: TensorJob) -> bool:
    """Whether two tensors are replaced by the same values."""
    if any(job.placed or job.added or job.rows or not job.trained for job in (one, other)):
        return False
    if len(one.trained) != len(other.trained):
        return False
    pairs = zip(one.trained, other.trained, strict=True)
    return all(w == v and torch.equal(t, u) for (t, w), (u, v) in pairs)


def _new_index(checkpoint: Checkpoint, shards: Sequence[OutputShard]) -> bytes | None:
    """Return the index of a changed layout, None where the base's own still holds."""
    if checkpoint.index is None or all(shard.same_layout for shard in shards):
        return None
    index = dict(checkpoint.index)
    found = {name: (shard.name, e) for shard in shards for name, e in shard.header.tensors.items()}
    order = [name for name in index["weight_map"] if name in found]
    index["weight_map"] = {name: found[name][0] for name in (*order, *found)}
    entries = [entry for _, entry in found.values()]
    metadata = dict(index.get("metadata") or {})
    metadata["total_size"] = sum(entry.n_bytes for entry in entries)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(
            entry.n_elements for entry in entries if DTYPE_BITS[entry.dtype] >= 16
        )
    index["metadata"] = metadata
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
