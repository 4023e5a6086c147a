"""The place of one site's update in a checkpoint: tensors, rows and orientation.

Whatever names and stacks the adapter and the file use, an update becomes low-rank terms on a range
of rows of one tensor, read as a matrix. A plain site is one such range; a stack of experts is one
for each expert, in one tensor or in many. Shapes decide the orientation, except for a square
matrix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_inject.checkpoint.base_class import SILENT, BaseClass
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.variants import VARIANTS
from lora_inject.core.files.safetensors_file import TensorEntry
from lora_inject.core.functional.factors import Patch
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
    terms: tuple[Patch, ...]  # the updates, on a matrix of `stop - start` rows
    gain: Gain | None = None  # factor on the outputs of W + the terms (DoRA)

    @property
    def site(self) -> str:
        """Name of the site."""
        return self.terms[0].spec.name


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
        """Return whether the matrix of a tensor is `(in, out)`.

        1. A matrix that is not square shows it. A layer whose adapter states the contrary is noted.
        2. A square matrix of experts is as the adapter or the class says.
        3. Any other square one is as the adapter states, unless it was wrong about such a layer.
        4. Then the class decides; without one nobody knows.
        """
        wide = (spec.out_features, spec.in_features)
        if matrix not in (wide, wide[::-1]):
            problem = f"its shape is {list(matrix)}, the adapter's update is {list(wide)}"
            raise NoPlace(f"'{name}': {problem}")
        may_be_wrong = spec.kind in {"linear", "conv1d"}
        if wide[0] != wide[1]:
            shown = matrix != wide
            if shown != spec.transposed and may_be_wrong:
                self.contradicted = self.contradicted or spec.name
            return shown
        if spec.experts is not None and self.of.known:
            said = spec.transposed or self.of.stack_transposed(name)
            if said is None:
                raise NoPlace(f"'{name}': {SILENT}, as transformers 5 does")
            return said
        if self.contradicted is None or not may_be_wrong:
            return spec.transposed
        return self._said_by_class(name)

    def _said_by_class(self, name: str) -> bool:
        said = self.of.transposed(name) if self.of.known else None
        if said is None:
            problem = f"the adapter states a wrong orientation for '{self.contradicted}'"
            raise NoPlace(f"'{name}': it is square, and {problem}")
        return said


@dataclass(frozen=True)
class SiteUpdate:
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

        `expert` counts the adapted ones. This includes the subtraction of a frozen start.
        """
        of_all = self.state.spec
        of_one = replace(of_all, experts=None, only=None, share="")
        spec = replace(of_one, weight_shape=matrix, transposed=transposed)
        if rows is not None and transposed:
            spec = replace(spec, in_features=matrix[0])
        elif rows is not None:
            spec = replace(spec, out_features=matrix[0])
        terms = []
        for A, B, sign in self.state.pairs:
            if expert is None:
                a, b = A.reshape(-1, spec.in_features), B.reshape(-1, spec.rank)
            else:
                a = A[0 if of_all.share == "A" else expert]
                b = B[0 if of_all.share == "B" else expert]
            if rows is not None:
                a, b = (a[:, rows], b) if transposed else (a, b[rows])
            terms.append(Patch(spec, a, b, sign * self.weight))
        variant, gain = VARIANTS[spec.variant], None
        if variant.gained:  # one matrix: sites that cannot have a gain were refused before
            gain = Gain(variant.gain, self.state.further, spec.spans)
        return Placed(name, entry, start, start + matrix[0], matrix[1], tuple(terms), gain)

    def _in_one(self, entry: TensorEntry) -> list[Placed]:
        """Place the update on one tensor, or on one stack of experts."""
        spec, name = self.state.spec, self.name
        matrix, transposed = self._matrix_in(entry)
        if spec.experts is None:
            return [self._placed(name, entry, matrix, transposed=transposed)]
        return [
            self._placed(name, entry, matrix, start=e * matrix[0], transposed=transposed, expert=n)
            for n, e in enumerate(spec.only or range(spec.experts))
        ]

    def _matrix_in(self, entry: TensorEntry) -> tuple[tuple[int, int], bool]:
        """Return the shape of the matrix, or of each of a stack, and whether it is `(in, out)`."""
        spec, shape = self.state.spec, entry.shape
        stacked = spec.experts is not None
        if spec.kind == "parameter" and len(spec.weight_shape) > 2 + stacked:  # of many axes
            if shape != spec.weight_shape:
                problem = f"its shape is {list(shape)}, the adapter's is {list(spec.weight_shape)}"
                raise NoPlace(f"'{self.name}': {problem}")
            rows, columns = spec.matrix_shape
            return (rows // (spec.experts or 1), columns), spec.transposed
        if len(shape) < 2 or (stacked and (len(shape) != 3 or shape[0] != spec.experts)):
            for_experts = f" for {spec.experts} experts" if stacked else ""
            problem = f"the shape {list(shape)}, which takes no low-rank update{for_experts}"
            raise NoPlace(f"'{self.name}' has {problem}")
        matrix = matrix_of(shape[1:] if stacked else shape)
        return matrix, self.way.transposed(spec, self.name, matrix)

    def _in_separate(self) -> list[Placed]:
        """Split an update of stacked experts over the per-expert tensors of the file."""
        spec, of = self.state.spec, self.way.of
        names = of.separate(self.name)  # of each expert, its parts one above the other
        if not names:
            return []
        self._check_complete(names)
        shape = self._shape_of_all(names)
        # The class lays them one above the other as they are, and the stack lies as the site says.
        matrix = (len(names[0]) * shape[0], shape[1])
        transposed = self.way.transposed(spec, self.name, matrix)
        places = []
        for n, e in enumerate(spec.only or range(len(names))):
            for part, name in enumerate(names[e]):
                rows = slice(part * shape[0], (part + 1) * shape[0])
                entry = of.checkpoint.tensors[name]
                places.append(
                    self._placed(name, entry, shape, transposed=transposed, expert=n, rows=rows)
                )
        return places

    def _check_complete(self, names: Sequence[Sequence[str]]) -> None:
        """Refuse experts of another number or with missing parts, and slices of them."""
        spec = self.state.spec
        if len(names) != spec.experts:
            problem = f"is not in the checkpoint, but for {len(names)} single experts"
            raise NoPlace(f"'{self.name}' {problem}")
        n_parts = max(map(len, names))
        for e, expert in enumerate(names):
            if len(expert) < n_parts:
                problem = f"of {n_parts} it has {expert}"
                raise NoPlace(f"expert {e} is not complete in the checkpoint: {problem}")
        if spec.slices is not None:
            raise NoPlace("slices of experts that the file keeps apart are not supported")

    def _shape_of_all(self, names: Sequence[Sequence[str]]) -> tuple[int, int]:
        """Return the shape that all tensors have, which is that of a matrix."""
        tensors, first = self.way.of.checkpoint.tensors, names[0][0]
        shape = tensors[first].shape
        for name in itertools.chain.from_iterable(names):
            if tensors[name].shape != shape:
                raise NoPlace(f"'{name}' has another shape than '{first}'")
        if len(shape) != 2:
            raise NoPlace(f"'{first}' has the shape {list(shape)}, which is no matrix")
        return shape[0], shape[1]

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
            problem = f"{list(entry.shape)} is not stacked as (experts, out, in)"
            raise NoPlace(f"'{entry.name}' {problem}")
        if place.expert >= n_experts:
            problem = f"has {n_experts} experts, the adapter names number {place.expert}"
            raise NoPlace(f"'{entry.name}' {problem}")
        start = place.expert * rows + place.part * matrix[0]
        return [self._placed(entry.name, entry, matrix, start=start)]
