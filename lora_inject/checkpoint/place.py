"""The place of one site's update in a checkpoint: tensors, rows and orientation.

Whatever names and stacks the adapter and the file use, an update becomes low-rank terms on a range
of rows of one tensor, read as a matrix. A plain site is one such range; a stack of experts is one
for each expert, in one tensor or in many. Shapes decide the orientation, except for a square
matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.variants import VARIANTS
from lora_inject.core.files.safetensors_file import TensorEntry
from lora_inject.core.files.tensors import in_memory
from lora_inject.core.functional.fold import Term
from lora_inject.core.functional.gain import Gain
from lora_inject.core.spec.sites import SiteSpec


class NoPlace(Exception):  # noqa: N818  (collected into one error)
    """A tensor of an adapter has no place in a checkpoint."""


@dataclass(frozen=True)
class Placed:
    """Low-rank terms on some rows of one tensor."""

    tensor: str  # name of the tensor in the output
    # the base's tensor with the rows; differs from `tensor` where a tie is undone
    source: TensorEntry
    start: int  # first row of the tensor's matrix
    stop: int  # first row after
    n_cols: int  # columns of the tensor's matrix
    terms: tuple[Term, ...]  # the updates, on a matrix of `stop - start` rows
    gain: Gain | None = None  # factor on the outputs of W + the terms (DoRA)

    @property
    def site(self) -> str:
        """Name of the site."""
        return self.terms[0].spec.name


def read_terms(terms: Iterable[Term]) -> list[Term]:
    """Return updates with the values of those that are still in a file."""
    return [replace(term, A=in_memory(term.A), B=in_memory(term.B)) for term in terms]


def read_gain(gain: Gain | None) -> Gain | None:
    """Return a gain likewise."""
    if gain is None:
        return None
    return replace(gain, tensors={role: in_memory(t) for role, t in gain.tensors.items()})


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of a tensor seen as one matrix, in its own memory order."""
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


@dataclass
class Orientation:
    """What is known about the orientation of square matrices."""

    of: BaseClass  # the class of the base
    # name of a site whose shape contradicts the orientation that its adapter states
    contradicted: str | None = None

    def transposed(self, spec: SiteSpec, name: str, matrix: tuple[int, int]) -> bool:
        """Return whether the matrix of a tensor is `(in, out)`."""
        wide = (spec.out_features, spec.in_features)
        if matrix not in (wide, wide[::-1]):
            found = f"its shape is {list(matrix)}, the adapter's update is {list(wide)}"
            raise NoPlace(f"'{name}': {found}")
        may_be_wrong = spec.kind in {"linear", "conv1d"}
        if wide[0] != wide[1]:
            found_transposed = matrix != wide
            if found_transposed != spec.transposed and may_be_wrong:
                self.contradicted = self.contradicted or spec.name
            return found_transposed
        if spec.experts is not None and self.of.known:
            return spec.transposed or bool(self.of.transposed(name))
        if self.contradicted is None or not may_be_wrong:
            return spec.transposed
        said = self.of.transposed(name) if self.of.known else None
        if said is None:
            found = f"the adapter states a wrong orientation for '{self.contradicted}'"
            raise NoPlace(f"'{name}': it is square, and {found}")
        return said


@dataclass(frozen=True)
class Update:
    """The update of one site, to be placed under its weight's name in the files."""

    state: SiteState
    weight: float  # mixing weight of the adapter
    name: str
    way: Orientation

    def places(self, entry: TensorEntry | None) -> list[Placed]:
        """Return the places of the terms; empty if the weight is absent.

        `entry` is the base's tensor of that name, or the tensor that it is tied to, with the rows
        that the adapter adds to it.
        """
        if entry is not None:
            return self._in_one(entry)
        if not self.way.of.known:
            return []
        return self._in_separate() if self.state.spec.experts is not None else self._in_stack()

    def _placed(
        self,
        name: str,
        entry: TensorEntry,
        matrix: tuple[int, int],
        *,
        start: int = 0,
        transposed: bool = False,
        expert: int | None = None,
        rows: slice | None = None,
    ) -> Placed:
        """Put the update of one matrix, or some of its rows, on the rows of a tensor from `start`.

        This includes the subtraction of a frozen start.
        """
        spec = replace(self.state.spec, experts=None, weight_shape=matrix, transposed=transposed)
        if rows is not None and transposed:
            spec = replace(spec, in_features=matrix[0])
        elif rows is not None:
            spec = replace(spec, out_features=matrix[0])
        terms = []
        for A, B, sign in self.state.pairs:
            a = A.reshape(-1, spec.in_features) if expert is None else A[expert]
            b = B.reshape(-1, spec.rank) if expert is None else B[expert]
            if rows is not None:
                a, b = (a[:, rows], b) if transposed else (a, b[rows])
            terms.append(Term(spec, a, b, sign * self.weight))
        variant, gain = VARIANTS[spec.variant], None
        if variant.gained:  # one matrix: sites that cannot have a gain were refused before
            gain = Gain(variant.gain, self.state.further, spec.spans)
        return Placed(name, entry, start, start + matrix[0], matrix[1], tuple(terms), gain)

    def _in_one(self, entry: TensorEntry) -> list[Placed]:
        """Place the update on one tensor, or on one stack of experts."""
        spec, shape, name = self.state.spec, entry.shape, self.name
        stacked = spec.experts is not None
        if spec.kind == "parameter" and len(spec.weight_shape) > 2 + stacked:  # of many axes
            if shape != spec.weight_shape:
                found = f"its shape is {list(shape)}, the adapter's is {list(spec.weight_shape)}"
                raise NoPlace(f"'{name}': {found}")
            rows, columns = spec.matrix_shape
            matrix, transposed = (rows // (spec.experts or 1), columns), spec.transposed
        elif len(shape) < 2 or (stacked and (len(shape) != 3 or shape[0] != spec.experts)):
            for_experts = f" for {spec.experts} experts" if stacked else ""
            found = f"the shape {list(shape)}, which takes no low-rank update{for_experts}"
            raise NoPlace(f"'{name}' has {found}")
        else:
            matrix = matrix_of(shape[1:] if stacked else shape)
            transposed = self.way.transposed(spec, name, matrix)
        if not stacked:
            return [self._placed(name, entry, matrix, transposed=transposed)]
        return [
            self._placed(name, entry, matrix, start=e * matrix[0], transposed=transposed, expert=e)
            for e in range(spec.experts or 1)
        ]

    def _in_separate(self) -> list[Placed]:
        """Split an update of stacked experts over the per-expert tensors of the file."""
        spec, of = self.state.spec, self.way.of
        names, tensors = of.separate(self.name), of.checkpoint.tensors
        if not names:
            return []
        if len(names) != spec.experts:
            found = f"is not in the checkpoint, but for {len(names)} single experts"
            raise NoPlace(f"'{self.name}' {found}")
        n_parts = max(map(len, names))
        if short := [e for e, expert in enumerate(names) if len(expert) < n_parts]:
            found = f"of {n_parts} it has {names[short[0]]}"
            raise NoPlace(f"expert {short[0]} is not complete in the checkpoint: {found}")
        if spec.slices is not None:
            raise NoPlace("slices of experts that the file keeps apart are not supported")
        first, update = names[0][0], (spec.out_features, spec.in_features)
        shape = tensors[first].shape
        if odd := [n for expert in names for n in expert if tensors[n].shape != shape]:
            raise NoPlace(f"'{odd[0]}' has another shape than '{first}'")
        if len(shape) != 2 or (n_parts * shape[0], shape[1]) not in (update, update[::-1]):
            found = f"{n_parts} of {list(shape)}, the adapter's update is {list(update)}"
            raise NoPlace(f"'{first}' and its neighbors are {found}")
        matrix = (shape[0], shape[1])
        # A before B where the update was made for the transposed stack (PEFT before 0.19).
        transposed = (n_parts * shape[0], shape[1]) != update
        return [
            self._placed(one, tensors[one], matrix, transposed=transposed, expert=e,
                         rows=slice(part * shape[0], (part + 1) * shape[0]))
            for e, expert in enumerate(names)
            for part, one in enumerate(expert)
        ]  # fmt: skip

    def _in_stack(self) -> list[Placed]:
        """Place the update of one expert, named apart, in its rows of a stack `(E, out, in)`."""
        of, spec = self.way.of, self.state.spec
        place = of.place_of(self.name)
        entry = None if place is None else of.checkpoint.tensors.get(of(place.name))
        if place is None or place.expert is None or entry is None or len(entry.shape) != 3:
            return []
        matrix = (spec.out_features, spec.in_features)
        n_experts, rows, cols = entry.shape
        if (rows, cols) != (place.n_parts * matrix[0], matrix[1]):
            found = f"{list(entry.shape)} is not stacked as (experts, out, in)"
            raise NoPlace(f"'{entry.name}' {found}")
        if place.expert >= n_experts:
            found = f"has {n_experts} experts, the adapter names number {place.expert}"
            raise NoPlace(f"'{entry.name}' {found}")
        start = place.expert * rows + place.part * matrix[0]
        return [self._placed(entry.name, entry, matrix, start=start)]
