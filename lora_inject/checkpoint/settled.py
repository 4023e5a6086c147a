"""Changes that follow from the updates of a merge, and updates that are refused.

Ties are cut, tensors are dequantized or cast, a vocabulary grows. Each may change `config.json`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_inject.checkpoint.base_class import UNTIED, BaseClass
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.merge_inputs import MergeOptions
from lora_inject.checkpoint.output_files import TensorJob, clash
from lora_inject.checkpoint.quantized import FORMAT_DTYPES, why_not
from lora_inject.errors import CheckpointError
from lora_inject.storage.tensor_rows import FLOATS


@dataclass
class Settled:
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
            _check(self.checkpoint, job)
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
        """Write every tensor of a cut tie separately."""
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
                    f"other layers share its tensor, and the class {classes[0]} cannot load them "
                    "apart",
                    "Adapt other layers, or keep this adapter unmerged",
                )
        if not cut:
            return
        self._store_apart()
        for name, job in self.jobs.items():
            if not job.stored and job.source is not None:
                self.notes.append(f"'{name}' was tied and becomes a separate tensor")
        if self.checkpoint.config:
            self.config_changes |= UNTIED

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
                    found = f"its rows are replaced, and it is parted from '{name}', its tied head"
                    raise clash(source, found)
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
            job.dtype = dtype if job.dtype in FLOATS else job.dtype
        if self.checkpoint.config:
            keys = [k for k in ("dtype", "torch_dtype") if any(k in t for t in self._tables)]
            for key in keys or ["torch_dtype"]:
                self.config_changes[key] = self.options.dtype

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
                self.config_changes["vocab_size"] = rows
            self.notes.append(f"'{name}' grows from {old} to {rows} rows")


def _may_be_tied(job: TensorJob) -> bool:
    """Whether an update may concern a tie; only then is the class built.

    Ties join embeddings, heads and whole stacks of layers. So an update counts if its site is an
    embedding, its tensor is not in the files, or its name has no layer number.
    """
    numbered = any(map(str.isdigit, job.name.split(".")))
    is_embedding = any(t.spec.kind == "embedding" for p in job.placed for t in p.terms)
    return not job.stored or is_embedding or (len(job.shape) > 1 and not numbered)


def _check(checkpoint: Checkpoint, job: TensorJob) -> None:
    """Refuse updates that overlap, or whose tensor is not of floats."""
    if job.packed is None and job.reason != "cast":
        _check_plain(checkpoint, job)
    if job.packed is not None and job.again:
        found = "" if job.packed.written else f"quantizing to {job.dtype} is not supported"
        if job.grows or not job.stored:
            found = "it is quantized, and would grow or become a separate tensor"
        if found:
            remedy = 'Write plain floats: pass dequantize="bfloat16"'
            raise CheckpointError(f"merge into '{job.name}'", found, remedy)
    places = [(p.start, p.stop) for p in job.placed]
    gained = [p for p in job.placed if p.gain is not None]
    scaled = any(abs(term.weight) != 1 for p in gained for term in p.terms)
    mixed = any(job.rows or job.trained or places.count((p.start, p.stop)) > 1 for p in gained)
    overlap = any(a[1] > b[0] for a, b in itertools.pairwise(sorted(set(places))))
    rows = [index for indices, _ in job.rows for index in indices]
    copies, shapes = len(job.trained), {tuple(t.shape) for t, _ in job.trained}
    clashes: dict[str, Collection[Any] | bool] = {
        "DoRA's update cannot be mixed with others or weighted": scaled or mixed,
        "one adapter makes it grow and another updates it": bool(
            job.placed and copies and job.grows
        ),
        "the adapters' values have different shapes": len(shapes) > 1,
        "the base lacks it and several adapters add it": not job.source and copies > 1,
        "two adapters need different shapes of it": shapes - {job.shape},
        "two sites adapt rows of it that overlap": overlap
        or len({p.n_cols for p in job.placed}) > 1,
        "the same row is replaced twice": len(set(rows)) < len(rows) or bool(rows and copies),
    }
    for found, is_so in clashes.items():
        if is_so:
            raise clash(job.name, found)


def _check_plain(checkpoint: Checkpoint, job: TensorJob) -> None:
    asked, source = f"merge into '{checkpoint.folder}'", job.source
    is_float = source is None or source.dtype in FLOATS
    names = [job.name] if source is None or is_float else [source.name, job.name]
    if quantized := why_not(checkpoint, names):
        raise CheckpointError(asked, *quantized)
    if source is not None and not is_float:
        found = f"'{job.name}' has the dtype {source.dtype}"
        raise CheckpointError(asked, found, "Only floating point weights take an update")


def _same_copies(one: TensorJob, other: TensorJob) -> bool:
    """Whether two tensors are replaced by the same values."""
    if any(job.placed or job.added or job.rows or not job.trained for job in (one, other)):
        return False
    if len(one.trained) != len(other.trained):
        return False
    pairs = zip(one.trained, other.trained, strict=True)
    return all(w == v and torch.equal(t, u) for (t, w), (u, v) in pairs)
