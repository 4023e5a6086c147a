"""The place of every tensor of an adapter in a checkpoint.

1. A name begins as the user says; then it is one of the files; or the class of the base says what
   the files call it.
2. The rows of a tensor are those of the update's matrix; of a stack of experts those of each
   expert, in one tensor or in many.
3. The shape decides whether a matrix is `(in, out)`. Of a square one the adapter states it; of
   stacked experts the class does, too.

No tensor is left out silently: the first without a place is an error, with the reason and the
nearest names. What the adapter holds of the base is compared with it: the sixteen values of each
adapted weight in its fingerprint (`adapter.fingerprint`), and the whole embeddings that PEFT
stores. If a vocabulary grew, only such a copy has the new rows, and it is used as the base.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.merge_inputs import (
    MergeOptions,
    WeightedAdapter,
    names_of_site,
    renamed,
)
from lora_inject.checkpoint.output_files import Placed, TensorJob, clash, matrix_of
from lora_inject.checkpoint.quantized_base import why_no_update
from lora_inject.core.adapter.fingerprint import Fingerprint, Sampled, base_differences, same_values
from lora_inject.core.adapter.reshape import matrices_of
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.files.row_reader import RowReader
from lora_inject.core.files.safetensors_file import FLOATS, TensorEntry
from lora_inject.core.functional.factors import Patch
from lora_inject.core.functional.gain import Gain
from lora_inject.core.spec.names import nearest
from lora_inject.core.spec.sites import SiteSpec, fits_kernel
from lora_inject.core.spec.variants import VARIANTS
from lora_inject.errors import CheckpointError


class NoPlace(Exception):  # noqa: N818  (becomes an error with a remedy)
    """A tensor of an adapter has no place in a checkpoint."""


def place_adapter(
    adapter: WeightedAdapter,
    of: BaseClass,
    options: MergeOptions,
    jobs: dict[str, TensorJob] | None = None,
) -> Places:
    """Find the place of every tensor of an adapter in the checkpoint of a class, or refuse it.

    Reads the options `allow_new`, `any_base` and `rename`. `jobs` are those of earlier adapters, by
    output tensor, to which this one adds its own.
    """
    if adapter.state.rows and adapter.weight != 1:
        problem = f"rows of {adapter.label} cannot be replaced with weight {adapter.weight}"
        raise clash(next(iter(adapter.state.rows)), problem)
    places = Places(adapter, of, options, {} if jobs is None else jobs)
    if not options.any_base:
        places.check_same_base()
    return places


class Places:
    """The placement of one adapter on a checkpoint.

    Attributes:
        jobs: Each output tensor that the adapter or an earlier one changes, by name.
    """

    def __init__(
        self,
        adapter: WeightedAdapter,
        of: BaseClass,
        options: MergeOptions,
        jobs: dict[str, TensorJob],
    ) -> None:
        """Place every tensor."""
        self.adapter, self.of, self.options, self.jobs = adapter, of, options, jobs
        self.checkpoint = of.checkpoint
        self._kinds: dict[str, str] = {}  # what the adapter does to an output tensor
        self._class_is_built = False  # because a name was not in the files
        state, stored = adapter.state, self.checkpoint.tensors
        updates = [(site.spec, one) for site in state.sites.values() for one in self._updates(site)]
        for _, (name, put) in updates:
            self._place(name, put)
        for spec, (name, put) in updates:
            for alias in spec.aliases:  # a layer of several names has as many in the files
                other = alias + name.removeprefix(spec.name)
                if (there := self.rule(other)) in stored and there not in self._kinds:
                    self._place(other, put)
        for name, value in state.trained.items():
            if name not in state.rows:
                self._place(name, partial(self._trained, value=value))
        for name, copy in state.base_copies.items():
            self._place(name, partial(self._copy, copy=copy))
        # Stored ones first: a tied head follows its embedding.
        for name in sorted(state.rows, key=lambda name: self.rule(name) not in stored):
            rows = partial(self._rows, indices=state.rows[name], values=state.trained[name])
            self._place(name, rows)

    def _updates(self, site: SiteState) -> Iterator[tuple[str, Callable[[str], None]]]:
        """Yield the name of each tensor that a site updates, and what places it under a name."""
        weight = names_of_site(site.spec)[0]
        yield weight, partial(self._site, site=site)
        if site.spec.lora_bias:
            bias = f"{weight.removesuffix('weight')}bias"
            yield bias, partial(self._added, vector=site.scale * site.further["b"].detach())

    def _place(self, original: str, put: Callable[[str], None]) -> None:
        """Place one tensor of the adapter under its name in the files, or refuse the adapter."""
        try:
            put(self.rule(original))
        except NoPlace as reason:
            raise self._without_place(original, str(reason)) from None

    def _without_place(self, original: str, reason: str) -> CheckpointError:
        asked = f"merge {self.adapter.label} into '{self.checkpoint.folder}'"
        if quantized := why_no_update(self.checkpoint, [original]):
            return CheckpointError(asked, *quantized)
        name, state = self.rule(original), self.adapter.state
        close = nearest(name, self.checkpoint.tensors)
        near = f"Nearest names in the checkpoint: {', '.join(map(repr, close))}. " if close else ""
        is_whole = original in state.trained and original not in state.rows
        new = is_whole and name not in self.checkpoint.tensors
        add = "Add it, such as a new head, with --allow-new. " if new else ""
        return CheckpointError(
            asked,
            reason if original in reason else f"'{original}': {reason}",
            f"{near}{add}Use the checkpoint that the adapter was trained on, or say how its names "
            "differ: --rename OLD=NEW. Nothing was written",
        )

    def rule(self, name: str) -> str:
        """Return the files' name of a tensor that the adapter names."""
        name = renamed(name, self.options.rename)
        if name in self.checkpoint.tensors or name in (self.options.tie or ()) or not self.of.known:
            return name
        try:
            new = self.of(name)
        except CheckpointError:  # the class cannot be built, which is told where it is missed
            return name
        self._class_is_built = True
        return new

    def _job(self, name: str, entry: TensorEntry | None, kind: str) -> TensorJob:
        """Return the job of an output tensor, to which the adapter does something of this kind."""
        if name not in self.jobs:
            self.jobs[name] = TensorJob.of(self.checkpoint, name, entry)
        job, label = self.jobs[name], self.adapter.label
        if name not in self._kinds:
            job.adapters += (label,)
        if self._kinds.setdefault(name, kind) != kind:
            raise clash(name, f"{label} holds values of it and an update as well")
        return job

    def of_site(self, site: str) -> list[Placed]:
        """Return the places of a site's update, in the order of its experts."""
        return [p for job in self.jobs.values() for p in job.placed if p.site == site]

    # The base that it was made on ----------------------------------------------------------------

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
            # A tied head is no reason to build the class, which nothing else asked for.
            stored = self.rule(name) if self.options.rename or self._class_is_built else name
            entry = checkpoint.tensors.get(stored)
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

    def _equal(self, entry: TensorEntry, copy: Tensor) -> bool:
        reader = RowReader(self.checkpoint.path_of(entry.name))
        blocks = reader.blocks(entry, math.prod(entry.shape[1:]))
        parts = ((rows, copy[start : start + len(rows)]) for start, rows in blocks)
        return all(same_values(rows.view(part.shape), part) for rows, part in parts)

    # Tensors ------------------------------------------------------------------------------------

    def _find(self, name: str) -> TensorEntry | None:
        """Return the tensor of a name, or the tensor that it is tied to."""
        tensors = self.checkpoint.tensors
        if name in tensors:
            return tensors[name]
        try:
            source = self.of.source_of(name)
        except CheckpointError as error:
            raise _absent(name, f" (could not {error.asked}: {error.found})") from None
        return None if source is None else tensors[source]

    def _trained(self, name: str, value: Tensor) -> None:
        try:
            entry = _fitting(name, value, self._find(name))
        except NoPlace:
            if not self.options.allow_new or name in self.checkpoint.tensors:
                raise
            entry = None
        job = self._job(name, entry, "trained")
        job.shape = tuple(value.shape)
        job.trained += ((value, self.adapter.weight),)

    def _copy(self, name: str, copy: Tensor) -> None:
        """Take the adapter's copy of a base tensor that grew; refuse another one that differs."""
        entry = _fitting(name, copy, self._find(name))
        if entry.name in self.checkpoint.packed:
            return  # the copy has the values before they were quantized
        if tuple(copy.shape) != entry.shape:
            job = self._job(name, entry, self._kinds.get(name, "copy"))
            if job.base_copy is not None:
                raise clash(name, "both hold a copy of it", job.adapters)
            job.shape, job.base_copy = tuple(copy.shape), copy
        elif entry.dtype not in FLOATS or not self._equal(entry, copy):
            raise CheckpointError(
                f"merge {self.adapter.label}",
                f"it carries a copy of '{name}' that differs from the base",
                "Use the base that it was trained on, or list the tensor among its trained ones",
            )

    def _added(self, name: str, vector: Tensor) -> None:
        entry = _fitting(name, vector, self.checkpoint.tensors.get(name))
        self._job(name, entry, "added").added += ((vector, self.adapter.weight),)

    def _rows(self, name: str, indices: tuple[int, ...], values: Tensor) -> None:
        entry = self._find(name)
        if entry is None:
            raise _absent(name)
        if len(entry.shape) != 2 or tuple(values.shape) != (len(indices), entry.shape[1]):
            problem = f"{list(values.shape)} for {len(indices)} rows of {list(entry.shape)}"
            raise NoPlace(f"'{name}': the adapter's rows are {problem}")
        if not all(0 <= index < entry.shape[0] for index in indices):
            raise NoPlace(f"'{name}' has only {entry.shape[0]} rows")
        if name in self.checkpoint.tensors:
            self._job(name, entry, "rows").rows += ((indices, values),)
            return
        mine = self.jobs[entry.name].rows if entry.name in self.jobs else ()
        if not any(at == indices and torch.equal(t, values) for at, t in mine):
            raise NoPlace(f"'{name}' is the same tensor as '{entry.name}', which gets other rows")

    # Low-rank updates ---------------------------------------------------------------------------

    def _site(self, name: str, site: SiteState) -> None:
        """Place the update of a site under the name of its weight."""
        entry = self._find(name)
        copy = self.adapter.state.base_copies.get(site.spec.weight)
        if copy is not None and entry is not None and _grew(entry, copy):
            entry = replace(entry, shape=tuple(copy.shape))
        if entry is not None:
            self._in_one(name, entry, site)
        elif self.of.known and site.spec.experts is not None:
            self._in_separate(name, site)
        else:
            raise _absent(name)

    def _put(self, name: str, entry: TensorEntry, site: SiteState, of: str) -> None:
        """Put an update on a tensor; `of` is the name of its site in the adapter."""
        spec, weight = site.spec, self.adapter.weight
        terms = tuple(Patch(spec, A, B, sign * weight) for A, B, sign in site.pairs)
        variant, gain = VARIANTS[spec.variant], None
        if variant.gained:  # one matrix: sites that cannot have a gain were refused before
            gain = Gain(variant.gain, site.further, spec.spans)
        source = self.checkpoint.tensors[entry.name]
        self._job(name, source, "placed").placed += (Placed(of, source, terms, gain),)

    def _in_one(self, name: str, entry: TensorEntry, site: SiteState) -> None:
        """Place an update on one tensor, or on one stack of experts."""
        spec, shape = site.spec, entry.shape
        stacked = spec.experts is not None
        if spec.kind == "parameter" and len(spec.weight_shape) > 2 + stacked:  # of many axes
            if shape != spec.weight_shape:
                problem = f"its shape is {list(shape)}, the adapter's is {list(spec.weight_shape)}"
                raise NoPlace(f"'{name}': {problem}")
            transposed = spec.transposed
        elif len(shape) < 2 or (stacked and (len(shape) != 3 or shape[0] != spec.experts)):
            for_experts = f" for {spec.experts} experts" if stacked else ""
            problem = f"the shape {list(shape)}, which takes no low-rank update{for_experts}"
            raise NoPlace(f"'{name}' has {problem}")
        elif not stacked and not fits_kernel(spec, shape):
            problem = f"its shape is {list(shape)}, the adapter's is {list(spec.weight_shape)}"
            raise NoPlace(f"'{name}': {problem}")
        else:
            matrix = matrix_of(shape[1:] if stacked else shape)
            transposed = self.is_transposed(spec, name, matrix)
        self._put(name, entry, _lying(site, transposed), spec.name)

    def _in_separate(self, name: str, site: SiteState) -> None:
        """Split an update of stacked experts over the per-expert tensors of the file."""
        spec, tensors = site.spec, self.checkpoint.tensors
        names: list[list[str]] = []  # of each expert those that lie one above the other in a stack
        with contextlib.suppress(CheckpointError):  # a class that cannot be built
            names = self.of.separate(name)
        if not names:
            raise _absent(name)
        n_parts, shape = max(map(len, names)), tensors[names[0][0]].shape
        for e, parts in enumerate(names):
            if len(parts) < n_parts or any(tensors[part].shape != shape for part in parts):
                problem = f"it has {parts}, of {n_parts} matrices {list(shape)}"
                raise NoPlace(f"expert {e} is not complete in the checkpoint: {problem}")
        if len(names) != spec.experts or len(shape) != 2 or spec.slices is not None:
            problem = f"is not in the checkpoint, but {n_parts} x {list(shape)} for each of"
            raise NoPlace(f"'{name}' {problem} {len(names)} experts, which the update does not fit")
        height, n_cols = shape
        # The class lays them one above the other as they are, and the stack lies as the site says.
        transposed = self.is_transposed(spec, name, (n_parts * height, n_cols))
        for part, update in matrices_of(_lying(site, transposed), names, "merge").items():
            self._put(part, tensors[part], update, spec.name)

    def is_transposed(self, spec: SiteSpec, name: str, matrix: tuple[int, int]) -> bool:
        """Return whether the matrix of a tensor is `(in, out)`.

        1. A matrix that is not square shows it.
        2. A square matrix of experts is as the adapter or the class says.
        3. Any other square one is as the adapter states, unless the adapter is wrong about a layer
           that is not square: then the class decides, and without one nobody knows.
        """
        wide = (spec.out_features, spec.in_features)
        if matrix not in (wide, wide[::-1]):
            problem = f"its shape is {list(matrix)}, the adapter's update is {list(wide)}"
            raise NoPlace(f"'{name}': {problem}")
        if wide[0] != wide[1]:
            return matrix != wide
        if spec.experts is not None and self.of.known:
            return spec.transposed or self.of.stack_transposed(name)
        if not _may_be_wrong(spec) or self._contradicted is None:
            return spec.transposed
        said = self.of.transposed(name) if self.of.known else None
        if said is None:
            problem = f"the adapter states a wrong orientation for '{self._contradicted}'"
            raise NoPlace(f"'{name}': it is square, and {problem}")
        return said

    @cached_property
    def _contradicted(self) -> str | None:
        """The name of a layer whose shape in the files contradicts what the adapter states."""
        for spec in (site.spec for site in self.adapter.state.sites.values()):
            entry = self.checkpoint.tensors.get(self.rule(names_of_site(spec)[0]))
            stated = (spec.out_features, spec.in_features)[:: -1 if spec.transposed else 1]
            shown = stated if entry is None else matrix_of(entry.shape)
            if _may_be_wrong(spec) and shown != stated and shown == stated[::-1]:
                return spec.name
        return None


def _lying(site: SiteState, transposed: bool) -> SiteState:
    """Return a site whose matrix lies as it does in the files."""
    spec = site.spec
    if spec.transposed == transposed:
        return site
    *around, n_rows, n_cols = spec.weight_shape
    shape = (*around, n_cols, n_rows)
    return site.at(replace(spec, transposed=transposed, weight_shape=shape))


def _may_be_wrong(spec: SiteSpec) -> bool:
    """Whether a reader of a foreign file may have assumed the orientation of a layer."""
    return spec.kind in {"linear", "conv1d"}


def _fitting(name: str, value: Tensor, entry: TensorEntry | None) -> TensorEntry:
    """Refuse a full tensor that the base lacks or has in another shape."""
    if entry is None:
        raise _absent(name)
    if tuple(value.shape) == entry.shape or _grew(entry, value):
        return entry
    problem = f"has the shape {list(entry.shape)}, the adapter's is {list(value.shape)}"
    raise NoPlace(f"'{name}' {problem}")


def _grew(entry: TensorEntry, value: Tensor) -> bool:
    """Whether a tensor is the base's matrix with further rows, for a larger vocabulary."""
    if value.dim() != 2 or len(entry.shape) != 2:
        return False
    return value.shape[1] == entry.shape[1] and value.shape[0] > entry.shape[0]


def _absent(name: str, why: str = "") -> NoPlace:
    return NoPlace(f"'{name}' is not in the checkpoint{why}")
