"""The place of every tensor of an adapter in a checkpoint.

The names are the checkpoint's own, or renamed as the user says, or as the checkpoint's class says.
No tensor is left out silently: an error lists those without a place, with the reason and the
nearest name.

What the adapter holds of the base is compared with it: the sixteen values of each adapted weight in
its fingerprint (`adapter.fingerprint`), and the whole embeddings that PEFT stores. If a vocabulary
grew, only such a copy has the new rows, and it is used as the base.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.merge_inputs import MergeOptions, WeightedAdapter
from lora_inject.checkpoint.output_files import TensorJob, clash
from lora_inject.checkpoint.place import NoPlace, Orientation, Placed, SiteUpdate
from lora_inject.checkpoint.quantized_base import why_no_update
from lora_inject.core.adapter.fingerprint import Fingerprint, Sampled, base_differences, same_values
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.row_reader import RowReader
from lora_inject.core.files.safetensors_file import FLOATS, TensorEntry
from lora_inject.core.spec.names import nearest
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import CheckpointError

MAX_SHOWN = 8

Rule = Callable[[str], str]
"""Gives the checkpoint's name of a tensor that the adapter names."""


def choose(adapter: WeightedAdapter, of: BaseClass, options: MergeOptions) -> Fit:
    """Find the place of every tensor of an adapter in the checkpoint of a class, or refuse it.

    Reads the options `allow_new`, `any_base` and `rename`.
    """
    if adapter.state.rows and adapter.weight != 1:
        problem = f"rows of {adapter.label} cannot be replaced with weight {adapter.weight}"
        raise clash(next(iter(adapter.state.rows)), problem)

    def fit(rule: Rule, label: str) -> Fit:
        way = Orientation(of)
        fit = Fit(rule, label, adapter, way, options.allow_new)
        if way.contradicted is not None:  # earlier square sites were placed without it
            fit = Fit(rule, label, adapter, way, options.allow_new)
        return fit

    label = "names as given" if options.rename else "names as they are"
    best, refusal = fit(_told(options.rename), label), None
    if best.left and not options.rename and of.known:
        try:
            best = min(best, fit(of, of.label), key=lambda f: len(f.left))
        except CheckpointError as error:
            refusal = error  # it explains itself only where nothing fits
    if best.left:
        raise _nothing_fits(best) from refusal
    if not options.any_base:
        best.check_same_base()
    return best


def _told(rename: Mapping[str, str]) -> Rule:
    """Return the rule that replaces the longest matching beginning of a name."""
    longest_first = sorted(rename, key=len, reverse=True)

    def renamed(name: str) -> str:
        old = next((old for old in longest_first if name.startswith(old)), None)
        return name if old is None else rename[old] + name[len(old) :]

    return renamed


def _nothing_fits(best: Fit) -> CheckpointError:
    checkpoint, state, left = best.checkpoint, best.adapter.state, best.left
    asked = f"merge {best.adapter.label} into '{checkpoint.folder}'"
    if quantized := why_no_update(checkpoint, [name for name, _ in left]):
        return CheckpointError(asked, *quantized)
    shown = [reason if name in reason else f"'{name}': {reason}" for name, reason in left]
    shown[MAX_SHOWN:] = [f"and {len(left) - MAX_SHOWN} more"] if len(left) > MAX_SHOWN else []
    close = nearest(best.rule(left[0][0]), checkpoint.tensors)
    near = f"Nearest names in the checkpoint: {', '.join(map(repr, close))}. " if close else ""
    n_tensors = sum(map(len, (state.sites, state.trained, state.base_copies)))
    whole = state.trained.keys() - state.rows.keys()
    new = all(name in whole and best.rule(name) not in checkpoint.tensors for name, _ in left)
    add = "Add them, such as a new head, with --allow-new. " if new else ""
    return CheckpointError(
        asked,
        f"{len(left)} of {n_tensors} tensors have no place in it ({'; '.join(shown)})",
        f"{near}{add}Use the checkpoint that the adapter was trained on, or say how its names "
        "differ: --rename OLD=NEW. Nothing was written",
    )


class Fit:
    """The placement of one adapter on a checkpoint, under one rule for names."""

    def __init__(
        self, rule: Rule, label: str, adapter: WeightedAdapter, way: Orientation, allow_new: bool
    ) -> None:
        """Place every tensor.

        `label` names the rule, `way` is what is known of orientations and of the base's class, and
        `allow_new` is whether trained tensors may be new to the base.
        """
        self.rule, self.label, self.adapter, self.way = rule, label, adapter, way
        self.checkpoint, self.allow_new = way.of.checkpoint, allow_new
        # job of each output tensor that the adapter changes, by name
        self.jobs: dict[str, TensorJob] = {}
        # output tensor name to the base's tensor and the adapter's copy of it
        self.copies: dict[str, tuple[TensorEntry, Tensor]] = {}
        self.left: list[tuple[str, str]] = []  # names without a place, and the reasons
        state = adapter.state
        for site in state.sites.values():
            self._place(_plain(site.spec), self._site, site)
        for name, site in _under_further_names(state).items():
            if (other := self.rule(name)) in self.checkpoint.tensors and other not in self.jobs:
                self._place(name, self._site, site)
        for name, value in state.trained.items():
            if name not in state.rows:
                self._place(name, self._trained, value)
        for name, value in state.base_copies.items():
            self._place(name, self._copy, value)
        for name, value in _biases(state).items():
            self._place(name, self._added, value)
        stored = self.checkpoint.tensors  # first: a tied head follows its embedding
        for name in sorted(state.rows, key=lambda name: self.rule(name) not in stored):
            self._place(name, self._rows, (state.rows[name], state.trained[name]))

    def _place(self, original: str, put: Callable[[str, Any], None], value: Any) -> None:
        """Place one tensor of the adapter under its name in the files."""
        try:
            put(self.rule(original), value)
        except NoPlace as reason:
            self.left.append((original, str(reason)))

    def job(self, name: str, entry: TensorEntry | None) -> TensorJob:
        """Return the job of an output tensor; create it if there is none."""
        if name not in self.jobs:
            self.jobs[name] = TensorJob.of(self.checkpoint, name, entry)
        return self.jobs[name]

    def places(self, site: str) -> list[Placed]:
        """Return the places of a site's update, in the order of its experts."""
        return [p for job in self.jobs.values() for p in job.placed if p.site == site]

    def check_same_base(self) -> None:
        """Refuse an adapter whose fingerprint is off by more than a rounding to bfloat16."""
        saved = self.adapter.state.fingerprint
        if saved is None:
            return
        here = self._fingerprint_here(saved)
        known = {name: saved[name] for name in here}
        if differences := base_differences(known, here):
            name, how = next(iter(differences.items()))
            n_differ, n_compared = len(differences), len(here)
            raise CheckpointError(
                f"merge {self.adapter.label} into '{self.checkpoint.folder}'",
                f"it was made on another base: '{name}' {how} "
                f"({n_differ} of {n_compared} tensors differ)",
                "Use the base that it was trained on, or pass any_base=True to merge all the same",
            )

    def _fingerprint_here(self, saved: Fingerprint) -> Fingerprint:
        """Return what the files say about the weights of a fingerprint; not all can be compared."""
        checkpoint = self.checkpoint
        here: dict[str, Sampled] = {}
        for name, there in saved.items():
            entry = checkpoint.tensors.get(self.rule(name) or name)
            if entry is None or name in self.adapter.state.trained:  # absent, or replaced
                continue
            if entry.name in checkpoint.packed:
                packing = checkpoint.packed[entry.name].packing()
                if packing and there.packed:
                    here[name] = Sampled(there.shape, packed=packing)
            # Places depend on the shape: in stacked, cut and grown tensors they have other values.
            elif entry.shape == there.shape and entry.dtype in FLOATS:
                values = checkpoint.sample(entry, there.moved)
                here[name] = Sampled(there.shape, values, moved=there.moved)
        return here

    def grown_copies(self) -> Iterator[tuple[str, TensorEntry, Tensor]]:
        """Yield the adapter's copies of base tensors that grew; refuse others that differ."""
        for name, (entry, copy) in self.copies.items():
            if entry.name in self.checkpoint.packed:
                continue  # the copy has the values before they were quantized
            if tuple(copy.shape) != entry.shape:
                yield name, entry, copy
            elif entry.dtype not in FLOATS or not self._equal(entry, copy):
                raise CheckpointError(
                    f"merge {self.adapter.label}",
                    f"it carries a copy of '{name}' that differs from the base",
                    "Use the base that it was trained on, or list the tensor among its trained "
                    "ones",
                )

    def _equal(self, entry: TensorEntry, copy: Tensor) -> bool:
        reader = RowReader(self.checkpoint.path_of(entry.name))
        blocks = reader.blocks(entry, math.prod(entry.shape[1:]))
        parts = ((rows, copy[start : start + len(rows)]) for start, rows in blocks)
        return all(same_values(rows.view(part.shape), part) for rows, part in parts)

    def _site(self, name: str, state: SiteState) -> None:
        entry = self._find(name)
        copy = self.adapter.state.base_copies.get(state.spec.weight)
        if copy is not None and entry is not None and _grew(entry, copy):
            entry = replace(entry, shape=tuple(copy.shape))
        try:
            places = SiteUpdate(state, self.adapter.weight, name, self.way).places(entry)
        except CheckpointError:  # the class cannot be built
            places = []
        if not places:
            raise _absent(name)
        for place in places:
            self.job(place.tensor, self.checkpoint.tensors[place.source.name]).placed += (place,)

    def _trained(self, name: str, value: Tensor) -> None:
        try:
            entry = _fitting(name, value, self._find(name))
        except NoPlace:
            if not self.allow_new or name in self.checkpoint.tensors:
                raise
            entry = None
        job = self.job(name, entry)
        job.shape = tuple(value.shape)
        job.trained += ((value, self.adapter.weight),)

    def _copy(self, name: str, value: Tensor) -> None:
        self.copies[name] = (_fitting(name, value, self._find(name)), value)

    def _added(self, name: str, vector: Tensor) -> None:
        entry = _fitting(name, vector, self.checkpoint.tensors.get(name))
        self.job(name, entry).added += ((vector, self.adapter.weight),)

    def _rows(self, name: str, given: tuple[tuple[int, ...], Tensor]) -> None:
        entry, (indices, rows) = self._find(name), given
        if entry is None:
            raise _absent(name)
        if len(entry.shape) != 2 or tuple(rows.shape) != (len(indices), entry.shape[1]):
            problem = f"{list(rows.shape)} for {len(indices)} rows of {list(entry.shape)}"
            raise NoPlace(f"'{name}': the adapter's rows are {problem}")
        if not all(0 <= index < entry.shape[0] for index in indices):
            raise NoPlace(f"'{name}' has only {entry.shape[0]} rows")
        if name in self.checkpoint.tensors:
            self.job(name, entry).rows += (given,)
            return
        mine = self.jobs[entry.name].rows if entry.name in self.jobs else ()
        if not any(at == indices and torch.equal(t, rows) for at, t in mine):
            raise NoPlace(f"'{name}' is the same tensor as '{entry.name}', which gets other rows")

    def _find(self, name: str) -> TensorEntry | None:
        """Return the tensor of a name, or the tensor that it is tied to."""
        tensors = self.checkpoint.tensors
        if name in tensors:
            return tensors[name]
        try:
            source = self.way.of.source_of(name)
        except CheckpointError as error:
            why = f" (could not {error.asked}: {error.found})"
            raise _absent(name, why) from None
        return None if source is None else tensors[source]


def _plain(spec: SiteSpec) -> str:
    """Return the name that files give to a weight; layers of GPTQ, AWQ and HQQ pack it as another.

    A raw parameter keeps its name, whatever that is.
    """
    if spec.kind == "parameter":
        return spec.weight
    return re.sub(r"(^|\.)(qweight|W_q)$", r"\1weight", spec.weight)


def _under_further_names(state: AdapterState) -> dict[str, SiteState]:
    """Return the sites of layers that had several names, by the further names of their weights."""
    specs = ((site.spec, site) for site in state.sites.values())
    return {
        alias + _plain(spec).removeprefix(spec.name): site
        for spec, site in specs
        for alias in spec.aliases
    }


def _fitting(name: str, value: Tensor, entry: TensorEntry | None) -> TensorEntry:
    """Refuse a full tensor that the base lacks or has in another shape."""
    if entry is None:
        raise _absent(name)
    if tuple(value.shape) == entry.shape or _grew(entry, value):
        return entry
    problem = f"has the shape {list(entry.shape)}, the adapter's is {list(value.shape)}"
    raise NoPlace(f"'{name}' {problem}")


def _absent(name: str, why: str = "") -> NoPlace:
    return NoPlace(f"'{name}' is not in the checkpoint{why}")


def _biases(state: AdapterState) -> dict[str, Tensor]:
    """Return what each bias of B adds, by the name of the layer's bias."""
    return {
        _plain(site.spec).removesuffix("weight") + "bias": site.scale * site.further["b"].detach()
        for site in state.sites.values()
        if site.spec.lora_bias
    }


def _grew(entry: TensorEntry, value: Tensor) -> bool:
    """Whether a tensor is the base's matrix with further rows, for a larger vocabulary."""
    if value.dim() != 2 or len(entry.shape) != 2:
        return False
    return value.shape[1] == entry.shape[1] and value.shape[0] > entry.shape[0]
