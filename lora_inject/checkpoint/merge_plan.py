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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_inject.checkpoint.base_class import UNTIED, BaseClass, refused_tie
from lora_inject.checkpoint.base_copies import check_copies
from lora_inject.checkpoint.choose import Fit, choose
from lora_inject.checkpoint.dequantize import find_scales
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.options import MergeOptions
from lora_inject.checkpoint.output_files import FLOATS, OutputShard, TensorJob, lay_out
from lora_inject.checkpoint.quantized import why_not
from lora_inject.checkpoint.same_base import check_same_base
from lora_inject.checkpoint.side_files import edit_config, find_side_files, read_side_file
from lora_inject.checkpoint.weighted_adapter import WeightedAdapter, check_adapters
from lora_inject.errors import CheckpointError
from lora_inject.storage.safetensors_file import DTYPE_BITS


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
        return sum(shard.header.size_bytes for shard in self.shards)

    @property
    def jobs(self) -> tuple[TensorJob, ...]:
        """Every tensor that is computed, shard by shard."""
        return tuple(job for shard in self.shards for job in shard.jobs)

    @property
    def on_disk(self) -> bool:
        """Whether an adapter's tensors are views of a mapped file."""
        return any(adapter.on_disk for adapter in self.adapters)

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
        return {
            "base": str(self.base.folder),
            "base_bytes": self.base.n_bytes,
            "output_bytes": self.n_bytes,
            "adapters": [
                {"label": p.label, "weight": p.weight, "sites": len(p.state.sites), "names": rule}
                for p, (_, rule) in zip(self.adapters, self.rules, strict=True)
            ],
            "dtype": self.options.dtype,
            "shards": [
                {
                    "name": shard.name,
                    "bytes": shard.header.size_bytes,
                    "new": shard.base is None,
                    "same_layout": shard.same_layout,
                    "copied_bytes": sum(copy.n_bytes for copy in shard.copies),
                    "tensors": len(shard.header.tensors),
                    "merged": len(shard.jobs),
                }
                for shard in self.shards
            ],
            "tensors": [
                {
                    "name": job.name,
                    "action": job.action,
                    "dtype": job.dtype,
                    "shape": list(job.shape),
                    "sites": list(job.sites),
                }
                for job in self.jobs
            ],
            "config_changes": dict(self.config_changes),
            "index": "rewritten" if self.index is not None else "kept",
            "side_files": list(self.side_files),
            "notes": list(self.notes),
        }


def plan_merge(
    base: str | Path | Checkpoint,
    adapters: Sequence[WeightedAdapter],
    options: MergeOptions | None = None,
) -> MergePlan:
    """Plan a merge; reads headers and adapters, writes nothing.

    Args:
        base: Folder of the base, or the base as opened.
        adapters: The adapters to fold in.
        options: How; the defaults where None.

    Returns:
        The plan.

    Raises:
        CheckpointError: The base cannot be read or is quantized, an adapter is not finite, or any
            of its tensors has no place.
    """
    options = options or MergeOptions()
    check_adapters(adapters)
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    of = BaseClass(checkpoint, options.tie)
    fits = [choose(adapter, checkpoint, options, of) for adapter in adapters]
    builder = _Builder(checkpoint, options, of)
    for adapter, fit in zip(adapters, fits, strict=True):
        if not options.any_base:
            check_same_base(checkpoint, adapter, fit)
        builder.take(adapter, fit)
    builder.dequantize()
    builder.untie()
    builder.change_dtype()
    builder.check()
    shards = builder.shards()
    code_left: tuple[str, ...] = ()
    side_files: tuple[str, ...] = ()
    if checkpoint.config or checkpoint.index_name or len(list(checkpoint.folder.iterdir())) > 1:
        side_files, code_left = find_side_files(checkpoint.folder, code=options.copy_code)
    notes = list(builder.notes)
    if code_left:
        notes.append(f"code stays behind: {', '.join(code_left)}")
    return MergePlan(
        checkpoint,
        tuple(adapters),
        options,
        shards,
        tuple((adapter.label, fit.label) for adapter, fit in zip(adapters, fits, strict=True)),
        builder.config_changes,
        _new_index(checkpoint, shards),
        side_files,
        tuple(notes),
    )


class _Builder:
    """Gathers jobs from adapters, then settles what they imply for the rest of the checkpoint."""

    def __init__(self, checkpoint: Checkpoint, options: MergeOptions, of: BaseClass) -> None:
        self.checkpoint, self.of = checkpoint, of
        self.options = options
        self.jobs: dict[str, TensorJob] = {}
        self.config_changes: dict[str, Any] = {}
        self.notes: list[str] = []
        self.taken: list[tuple[WeightedAdapter, Fit]] = []
        self.scales = find_scales(checkpoint) if options.dequantize else {}
        self.dropped = frozenset(scales.entry.name for scales in self.scales.values())

    def take(self, adapter: WeightedAdapter, fit: Fit) -> None:
        """Add one adapter's updates."""
        self.taken.append((adapter, fit))
        shard_of = self.checkpoint.shard_of
        grown = check_copies(self.checkpoint, adapter, fit)
        for site, places in fit.placed.items():
            for place in places:
                job = self._job(place.tensor, self.checkpoint.tensors[place.source.name])
                self.jobs[place.tensor] = replace(
                    job,
                    placed=(*job.placed, place),
                    sites=_with(job.sites, site),
                    magnitude=self._magnitude(adapter, site, job),
                )
        for name, (entry, value) in fit.trained.items():
            job = self._job(name, entry)
            self.jobs[name] = replace(
                job,
                shape=tuple(value.shape),
                trained=(*job.trained, (value, adapter.weight)),
                sites=_with(job.sites, name),
                action="added" if name not in shard_of else "replaced",
            )
        for name, (entry, value) in grown.items():
            job = self._job(name, entry)
            if job.base_copy is not None:
                raise self._clash(name, "two adapters bring their own copy of it")
            self.jobs[name] = replace(job, shape=tuple(value.shape), base_copy=value)

        for name, (entry, value) in fit.added.items():
            job = self._job(name, entry)
            added = (*job.added, (value, adapter.weight))
            self.jobs[name] = replace(job, added=added, sites=_with(job.sites, name))
        for name, (entry, indices, value) in fit.rows.items():
            job = self._job(name, entry)
            if adapter.weight != 1:
                raise self._clash(name, f"rows cannot be replaced with weight {adapter.weight}")
            self.jobs[name] = replace(
                job,
                rows=(*job.rows, (indices, value)),
                sites=_with(job.sites, name),
                action="replaced" if not job.placed else job.action,
            )

    def _magnitude(self, adapter: WeightedAdapter, site: str, job: TensorJob) -> Tensor | None:
        """Return the magnitude that a job gets, which must be the only update of its tensor."""
        mine = adapter.magnitudes.get(site)
        if mine is None and job.magnitude is None:
            return None
        if job.placed or adapter.weight != 1:
            raise self._clash(job.name, "DoRA's update cannot be mixed with others or weighted")
        return mine

    def _job(self, name: str, entry: Any) -> TensorJob:
        if name in self.jobs:
            return self.jobs[name]
        checkpoint = self.checkpoint
        if entry is None:
            return TensorJob(name, None, None, self._new_dtype(), (), action="added")
        action = "folded" if name in checkpoint.tensors else "untied"
        shard = checkpoint.shard_of[entry.name]
        scales = self.scales.get(entry.name)
        dtype = entry.dtype if scales is None else "BF16"
        return TensorJob(name, entry, shard, dtype, entry.shape, scales=scales, action=action)

    def _new_dtype(self) -> str:
        """Return the dtype for tensors that the base lacks: what most of its values have."""
        sizes = dict.fromkeys(FLOATS, 0)
        for entry in self.checkpoint:
            if entry.dtype in sizes:
                sizes[entry.dtype] += entry.n_elements
        return max(sizes, key=lambda dtype: sizes[dtype])

    def dequantize(self) -> None:
        """Add a job for every float8 weight, where that was asked for."""
        for name in self.scales:
            if name not in self.jobs:
                job = self._job(name, self.checkpoint.tensors[name])
                self.jobs[name] = replace(job, action="dequantized")
        if self.scales and "quantization_config" in self.checkpoint.config:
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
                raise refused_tie(min(stuck), self.checkpoint)
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
                if source is not None and name not in self.of.inseparable:
                    self.jobs[name] = self._untied(name, source)

    def _may_be_tied(self, touched: Collection[str]) -> bool:
        """Whether an update is of a kind that ties concern: only then the class is asked.

        Ties join embeddings, heads and whole stacks of layers: what the adapter says is an
        embedding, what the files lack, and weights outside of any numbered list of layers.
        """
        embeddings = {
            place.tensor
            for adapter, fit in self.taken
            for site, places in fit.placed.items()
            if adapter.state.sites[site].spec.kind == "embedding"
            for place in places
        }
        return any(
            name not in self.checkpoint.tensors
            or name in embeddings
            or (len(self.jobs[name].shape) > 1 and not any(map(str.isdigit, name.split("."))))
            for name in touched
        )

    def _stays(self, group: frozenset[str]) -> bool:
        """Whether a tie holds after the merge; then what the files lack stays left out."""
        mine = [self.jobs[name] for name in sorted(group) if name in self.jobs]
        first = mine[0] if mine else None
        if first is None:
            return True
        grown = first.source is not None and first.shape != first.source.shape
        if len(mine) == 1 and grown and first.base_copy is None:
            self.notes.append(f"'{first.name}' grew and stays tied to the head")
            return True
        if len(mine) < len(group) or not all(_same_copies(first, job) for job in mine):
            return False
        for name in group - self.checkpoint.tensors.keys():
            del self.jobs[name]
        return True

    def _untied(self, name: str, source: str) -> TensorJob:
        """Return the job of a tensor that was left out, with the values that it was tied to."""
        entry, changed = self.checkpoint.tensors[source], self.jobs.get(source)
        grown = changed.base_copy if changed is not None else None
        shape = entry.shape if grown is None else tuple(grown.shape)
        shard = self.checkpoint.shard_of[source]
        return TensorJob(name, entry, shard, entry.dtype, shape, base_copy=grown, action="untied")

    def change_dtype(self) -> None:
        """Add a cast for every float tensor, where another dtype was asked for."""
        dtype = self.options.format_dtype
        if dtype is None:
            return
        for entry in self.checkpoint:
            job = self.jobs.get(entry.name)
            if job is None and entry.dtype in FLOATS and entry.dtype != dtype:
                shard = self.checkpoint.shard_of[entry.name]
                self.jobs[entry.name] = TensorJob(
                    entry.name, entry, shard, dtype, entry.shape, action="cast"
                )
        for name, job in self.jobs.items():
            if job.dtype in FLOATS:
                self.jobs[name] = replace(job, dtype=dtype)
        config = self.checkpoint.config
        if config:
            tables = [config, *(v for v in config.values() if isinstance(v, dict))]
            keys = [k for k in ("dtype", "torch_dtype") if any(k in t for t in tables)]
            for key in keys or ["torch_dtype"]:
                self.config_changes[key] = self.options.dtype

    def check(self) -> None:
        """Refuse what no writer could carry out."""
        for name, job in self.jobs.items():
            if job.scales is not None:
                pass
            elif job.source is not None and job.source.dtype not in FLOATS:
                reason = why_not(self.checkpoint, [job.source.name])
                found = reason.found if reason else f"'{name}' has the dtype {job.source.dtype}"
                remedy = reason.remedy if reason else "Only floating point weights take an update"
                raise CheckpointError(f"merge into '{self.checkpoint.folder}'", found, remedy)
            quantized = None
            if job.action != "cast" and job.scales is None:
                quantized = why_not(self.checkpoint, [name])
            if quantized is not None:
                asked = f"merge into '{self.checkpoint.folder}'"
                raise CheckpointError(asked, quantized.found, quantized.remedy)
            if sum(map(bool, (job.trained, job.placed, job.added))) > 1:
                raise self._clash(name, "one adapter replaces it and another updates it")
            if len(job.trained) > 1 and len({tuple(t.shape) for t, _ in job.trained}) > 1:
                raise self._clash(name, "the adapters' values have different shapes")
            if job.source is None and len(job.trained) > 1:
                raise self._clash(name, "the base lacks it and several adapters bring it")
            if any(t.shape != job.shape for t, _ in job.trained):
                raise self._clash(name, "two adapters want different shapes of it")
            self._check_rows(job)
            self._check_indices(job)
        self._check_vocabulary()

    def _check_indices(self, job: TensorJob) -> None:
        indices = [index for of_part, _ in job.rows for index in of_part]
        if len(set(indices)) != len(indices) or (job.rows and job.trained):
            raise self._clash(job.name, "the same row is replaced twice")

    def _check_rows(self, job: TensorJob) -> None:
        ranges = sorted({(p.start, p.stop) for p in job.placed})
        overlap = any(a[1] > b[0] for a, b in itertools.pairwise(ranges))
        if overlap or len({p.n_cols for p in job.placed}) > 1:
            raise self._clash(job.name, "two sites want rows of it that overlap")

    def _check_vocabulary(self) -> None:
        """Refuse a grown embedding whose head did not grow, and note the new size."""
        tensors = self.checkpoint.tensors
        for name, job in self.jobs.items():
            before = job.source
            if before is None or job.shape == before.shape:
                continue
            rows, old = job.shape[0], before.shape[0]
            ends = self.of.ends if self.of.known else frozenset()
            for other in sorted(ends & tensors.keys()):
                mine = self.jobs.get(other)
                shape = mine.shape if mine is not None else tensors[other].shape
                if tensors[other].shape[0] == old and shape[0] != rows:
                    raise self._clash(name, f"it grows to {rows} rows and '{other}' stays at {old}")
            if any(
                t.get("vocab_size") == old
                for t in (self.checkpoint.config, *self.checkpoint.config.values())
                if isinstance(t, dict)
            ):
                self.config_changes["vocab_size"] = rows
            self.notes.append(f"'{name}' grows from {old} to {rows} rows")

    def _clash(self, name: str, found: str) -> CheckpointError:
        return CheckpointError(
            f"merge into '{name}'",
            found,
            "Merge one adapter after the other, or leave one out",
        )

    def shards(self) -> tuple[OutputShard, ...]:
        """Lay out the output's files; what the base lacks goes behind it, in a file of its own."""
        checkpoint = self.checkpoint
        added = [job for name, job in self.jobs.items() if name not in checkpoint.tensors]
        alone = checkpoint.index_name is None
        shards = [
            lay_out(shard.name, shard, self.jobs, added if alone else (), self.dropped)
            for shard in checkpoint.shards.values()
        ]
        if added and not alone:
            name = f"{checkpoint.stem}-added.safetensors"
            while name in checkpoint.shards:
                name = name.replace("-added", "-added-added", 1)
            shards.append(lay_out(name, None, {}, added))
        return tuple(shards)


def _same_copies(one: TensorJob, other: TensorJob) -> bool:
    """Whether two tensors are replaced by the same values."""
    if any(job.placed or job.added or job.rows or not job.trained for job in (one, other)):
        return False
    pairs = zip(one.trained, other.trained, strict=False)
    alike = all(w == v and torch.equal(t, u) for (t, w), (u, v) in pairs)
    return alike and len(one.trained) == len(other.trained)


def _with(sites: tuple[str, ...], site: str) -> tuple[str, ...]:
    return sites if site in sites else (*sites, site)


def _new_index(checkpoint: Checkpoint, shards: Sequence[OutputShard]) -> bytes | None:
    """Return the index of a changed layout, None where the base's own still holds."""
    if checkpoint.index is None or all(shard.same_layout for shard in shards):
        return None
    index = dict(checkpoint.index)
    entries = [(shard.name, entry) for shard in shards for entry in shard.header.tensors.values()]
    found = {entry.name: shard for shard, entry in entries}
    order = [name for name in index["weight_map"] if name in found]
    index["weight_map"] = {name: found[name] for name in (*order, *found)}
    metadata = dict(index.get("metadata") or {})
    metadata["total_size"] = sum(entry.n_bytes for _, entry in entries)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(
            entry.n_elements for _, entry in entries if DTYPE_BITS[entry.dtype] >= 16
        )
    index["metadata"] = metadata
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
