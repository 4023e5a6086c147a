"""Where every tensor of an adapter belongs in a checkpoint.

The names are the checkpoint's own, or renamed as the user says, or as the checkpoint's class says.
Nothing is ever left over: what finds no place is listed, with the reason and the nearest name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lora_inject.adapter.site_state import SiteState
from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.options import MergeOptions
from lora_inject.checkpoint.output_files import TensorJob, clash
from lora_inject.checkpoint.place import NoPlace, Orientation, Placed, Update
from lora_inject.checkpoint.quantized import why_not
from lora_inject.checkpoint.weighted_adapter import WeightedAdapter
from lora_inject.errors import CheckpointError, nearest
from lora_inject.spec.sites import SiteSpec
from lora_inject.storage.safetensors_file import TensorEntry
from lora_inject.storage.tensors import in_memory

MAX_SHOWN = 8

Rule = Callable[[str], str]
"""Gives the checkpoint's name of a tensor that the adapter names."""


def weight_name(spec: SiteSpec) -> str:
    """Return the state dict key of a site's weight."""
    if spec.weight:
        return spec.weight
    return spec.name if spec.kind == "parameter" else f"{spec.name}.weight"


def choose(
    adapter: WeightedAdapter,
    checkpoint: Checkpoint,
    options: MergeOptions | None = None,
    of: BaseClass | None = None,
) -> Fit:
    """Find the place of every tensor of an adapter, or refuse it.

    Of the options `allow_new`, `rename` and `tie` are read; `of` is the class of the base, where it
    is known already.
    """
    options = options or MergeOptions()
    of = of or BaseClass(checkpoint, options.tie)
    if adapter.state.rows and adapter.weight != 1:
        found = f"rows cannot be replaced with weight {adapter.weight}"
        raise clash(next(iter(adapter.state.rows)), found)
    label = "names as told" if options.rename else "names as they are"
    best, refusal = _try(_told(options.rename), label, adapter, of, options), None
    if best.left and not options.rename and of.known:
        try:
            best = min(best, _try(of, of.label, adapter, of, options), key=lambda f: len(f.left))
        except CheckpointError as error:
            refusal = error  # it explains itself only where nothing fits
    if best.left:
        raise _nothing_fits(best) from refusal
    return best


def _told(rename: Mapping[str, str]) -> Rule:
    """Return the rule that replaces the longest of some beginnings."""
    longest_first = sorted(rename, key=len, reverse=True)

    def renamed(name: str) -> str:
        old = next((old for old in longest_first if name.startswith(old)), None)
        return name if old is None else rename[old] + name[len(old) :]

    return renamed


def _try(
    rule: Rule, label: str, adapter: WeightedAdapter, of: BaseClass, options: MergeOptions
) -> Fit:
    way = Orientation(of)
    fit = Fit(rule, label, adapter, way, options.allow_new)
    if way.contradicted is not None:  # earlier square sites were judged without it
        fit = Fit(rule, label, adapter, way, options.allow_new)
    return fit


def _nothing_fits(best: Fit) -> CheckpointError:
    checkpoint, adapter = best.way.of.checkpoint, best.adapter
    asked = f"merge {adapter.label} into '{checkpoint.folder}'"
    if quantized := why_not(checkpoint, [name for name, _ in best.left]):
        return CheckpointError(asked, *quantized)
    shown = "; ".join(
        reason if name in reason else f"'{name}': {reason}"
        for name, reason in best.left[:MAX_SHOWN]
    )
    more = f"; and {len(best.left) - MAX_SHOWN} more" if len(best.left) > MAX_SHOWN else ""
    close = nearest(best.rule(best.left[0][0]), checkpoint.tensors)
    near = f"Nearest names in the checkpoint: {', '.join(map(repr, close))}. " if close else ""
    state = adapter.state
    tables = (state.sites, state.trained, state.base_copies)
    return CheckpointError(
        asked,
        f"{len(best.left)} of {sum(map(len, tables))} tensors have no place in it ({shown}{more})",
        f"{near}Use the checkpoint that the adapter was trained on, or say how its names differ: "
        "--rename OLD=NEW. Nothing was written",
    )


@dataclass
class Fit:
    """The placement of one adapter on a checkpoint, for one rule to read names."""

    rule: Rule  # how names are read
    label: str  # the rule, for messages
    adapter: WeightedAdapter
    way: Orientation  # what is known of orientations, and of the base's class
    allow_new: bool  # whether trained tensors may be new to the base
    # job of each output tensor that the adapter changes, by name
    jobs: dict[str, TensorJob] = field(default_factory=dict)
    # output tensor name to the base's tensor and the adapter's copy of it
    copies: dict[str, tuple[TensorEntry, Tensor]] = field(default_factory=dict)
    # reasons why tensors have no place
    left: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Place every tensor."""
        state = self.adapter.state
        for site in state.sites.values():
            self._place(weight_name(site.spec), self._site, site)
        full = {name: t for name, t in state.trained.items() if name not in state.rows}
        rows = {name: (at, state.trained[name]) for name, at in state.rows.items()}
        for tensors, put in (
            (full, self._trained),
            (state.base_copies, self._copy),
            (_biases(state.sites.values()), self._added),
            (rows, self._rows),
        ):
            for name, value in tensors.items():
                self._place(name, put, value)

    def _place(self, original: str, put: Callable[[str, Any], None], value: Any) -> None:
        """Place one tensor of the adapter under its name in the files."""
        try:
            put(self.rule(original), value)
        except NoPlace as reason:
            self.left.append((original, str(reason)))

    def job(self, name: str, entry: TensorEntry | None) -> TensorJob:
        """Return the job of an output tensor; make it if there is none yet."""
        if name not in self.jobs:
            self.jobs[name] = TensorJob.of(self.way.of.checkpoint, name, entry)
        return self.jobs[name]

    def places(self, site: str) -> list[Placed]:
        """Return the places of a site's update, in the order of its experts."""
        return [p for job in self.jobs.values() for p in job.placed if p.site == site]

    def _site(self, name: str, state: SiteState) -> None:
        spec, adapter = state.spec, self.adapter
        entry = self._find(name)
        copy = adapter.state.base_copies.get(weight_name(spec))
        if copy is not None and entry is not None and _grew(entry, copy):
            entry = replace(entry, shape=tuple(copy.shape))
        try:
            places = Update(state, adapter.weight, name, self.way).places(entry)
        except CheckpointError:  # the class cannot be built
            places = []
        if not places:
            raise NoPlace(self._absent(name))
        for place in places:
            job = self.job(place.tensor, self.way.of.checkpoint.tensors[place.source.name])
            job.placed += (place,)

    def _trained(self, name: str, value: Tensor) -> None:
        try:
            entry = self._fitting(name, value, self._find(name))
        except NoPlace:
            if not self.allow_new or name in self.way.of.checkpoint.tensors:
                raise
            entry = None
        job = self.job(name, entry)
        job.shape = tuple(value.shape)
        job.trained += ((value, self.adapter.weight),)

    def _copy(self, name: str, value: Tensor) -> None:
        self.copies[name] = (self._fitting(name, value, self._find(name)), value)

    def _added(self, name: str, vector: Tensor) -> None:
        entry = self._fitting(name, vector, self.way.of.checkpoint.tensors.get(name))
        self.job(name, entry).added += ((vector, self.adapter.weight),)

    def _rows(self, name: str, given: tuple[tuple[int, ...], Tensor]) -> None:
        entry, (indices, rows) = self._find(name), given
        if entry is None:
            raise NoPlace(self._absent(name))
        if len(entry.shape) != 2 or tuple(rows.shape) != (len(indices), entry.shape[1]):
            found = f"{list(rows.shape)} for {len(indices)} rows of {list(entry.shape)}"
            raise NoPlace(f"'{name}': the adapter's rows are {found}")
        if not all(0 <= index < entry.shape[0] for index in indices):
            raise NoPlace(f"'{name}' has only {entry.shape[0]} rows")
        if name in self.way.of.checkpoint.tensors:
            self.job(name, entry).rows += (given,)
        elif not self._has_rows(entry.name, given):  # a tied head follows its embedding
            raise NoPlace(f"'{name}' is the same tensor as '{entry.name}', which gets other rows")

    def _has_rows(self, name: str, given: tuple[tuple[int, ...], Tensor]) -> bool:
        """Whether the adapter replaces these rows of a tensor with the same values."""
        job = self.jobs.get(name)
        mine = [] if job is None else job.rows
        return any(at == given[0] and torch.equal(t, given[1]) for at, t in mine)

    def _find(self, name: str) -> TensorEntry | None:
        """Return the tensor of a name, or the tensor that it is tied to."""
        tensors = self.way.of.checkpoint.tensors
        if name in tensors:
            return tensors[name]
        try:
            source = self.way.of.source_of(name)
        except CheckpointError as error:
            found = f"could not {error.asked}: {error.found}"
            raise NoPlace(f"{self._absent(name)} ({found})") from None
        return None if source is None else tensors[source]

    def _fitting(self, name: str, value: Tensor, entry: TensorEntry | None) -> TensorEntry:
        """Refuse a full tensor that the base lacks or has in another shape."""
        if entry is None:
            raise NoPlace(self._absent(name))
        if tuple(value.shape) == entry.shape or _grew(entry, value):
            return entry
        found = f"has the shape {list(entry.shape)}, the adapter's is {list(value.shape)}"
        raise NoPlace(f"'{name}' {found}")

    @staticmethod
    def _absent(name: str) -> str:
        return f"'{name}' is not in the checkpoint"


def _biases(sites: Iterable[SiteState]) -> dict[str, Tensor]:
    """Return what each bias of B adds, by the name of the layer's bias."""
    return {
        weight_name(site.spec).removesuffix("weight") + "bias": site.scale
        * in_memory(site.further["b"].detach())
        for site in sites
        if site.spec.lora_bias
    }


def _grew(entry: TensorEntry, value: Tensor) -> bool:
    """Whether a tensor is the base's matrix with more rows, for a larger vocabulary."""
    if value.dim() != 2 or len(entry.shape) != 2:
        return False
    return value.shape[1] == entry.shape[1] and value.shape[0] > entry.shape[0]
