"""Plan a merge in full, before anything is written.

Planning reads only headers and adapters, and lays every output file out to the byte. Every error
that can be known in advance is raised here; only errors of the disk and of rounding come later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.choose import Fit, choose
from lora_inject.checkpoint.index import (
    QUANTIZED_FILES,
    Checkpoint,
    edit_config,
    find_side_files,
    resolve_inside,
)
from lora_inject.checkpoint.merge_inputs import MergeOptions
from lora_inject.checkpoint.output_files import OutputShard, TensorJob, clash, lay_out
from lora_inject.checkpoint.quantized import unpacked
from lora_inject.checkpoint.settled import Settled
from lora_inject.checkpoint.merge_inputs import (
    Given,
    WeightedAdapter,
    check_adapters,
    weighted_adapter,
)
from lora_inject.errors import CheckpointError
from lora_inject.storage.safetensors_file import DTYPE_BITS


@dataclass(frozen=True)
class MergePlan:
    """Everything that a merge will do.

    Attributes:
        base: The checkpoint that is read.
        adapters: The adapters.
        options: Options of the merge.
        shards: The output's weight files, in the order of the base's.
        rules: How each adapter's names were read.
        config_changes: Keys of `config.json` that change.
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
            (s.name, s.header.digest, [(j.name, j.action, sorted(j.sites)) for j in s.jobs])
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


def _check_ties(checkpoint: Checkpoint, given_ties: Mapping[str, str]) -> None:
    """Refuse ties of which the files hold both tensors, or not the one that is said to be there."""
    for absent, stored in given_ties.items():
        found = f"the files hold '{absent}'" if absent in checkpoint.tensors else ""
        if stored not in checkpoint.tensors:
            found = f"the files lack '{stored}'"
        if found:
            remedy = "Name a tensor that the files lack, and the one in them that it equals"
            raise CheckpointError(f"tie '{absent}' to '{stored}'", found, remedy)


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
    weighted = [weighted_adapter(adapter, checkpoint) for adapter in adapters]
    check_adapters(weighted)
    _check_ties(checkpoint, options.tie or {})
    of = BaseClass(checkpoint, options.tie)
    fits = [choose(adapter, of, options) for adapter in weighted]
    settled = Settled(of, options, _joined(fits))
    shards, notes = lay_out(checkpoint, settled.jobs), list(settled.notes)
    side_files, code_left = find_side_files(checkpoint.folder, code=options.copy_code)
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
            jobs[name] = jobs[name].joined(job) if name in jobs else job
    return jobs


def _new_index(checkpoint: Checkpoint, shards: Sequence[OutputShard]) -> bytes | None:
    """Return the index of a changed layout; None if the base's own index is still right."""
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
