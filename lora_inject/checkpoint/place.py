"""Where one adapter's updates land: tensors, rows, and the way round.

Whatever the adapter and the file each call a weight, and however they stack it, an update ends as
low-rank terms on a range of rows of one tensor seen as a matrix. A plain site is one such range;
a stack of experts is one for each expert, in one tensor or in many. Shapes decide the orientation;
only a square matrix needs to be told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lora_inject.adapter.state import SiteState
from lora_inject.adapter.variants import VARIANTS
from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.functional import Gain, Term
from lora_inject.spec.sites import SiteSpec
from lora_inject.storage.safetensors_file import TensorEntry


@dataclass(frozen=True)
class Placed:
    """Low-rank terms on some rows of one tensor.

    Attributes:
        tensor: Name of the tensor in the output.
        source: The base's tensor that the rows come from; another name where a tie is undone.
        start: First row of the tensor's matrix.
        stop: First row after.
        n_cols: Columns of the tensor's matrix.
        terms: The updates, on a matrix of `stop - start` rows.
        gain: What multiplies the outputs of their sum with W, where the variant has a gain.
    """

    tensor: str
    source: TensorEntry
    start: int
    stop: int
    n_cols: int
    terms: tuple[Term, ...]
    gain: Gain | None = None


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of a tensor seen as one matrix, in its own memory order.

    Examples:
        >>> matrix_of((8, 3, 3, 3)), matrix_of((7,))
        ((8, 27), (1, 7))
    """
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


@dataclass
class Orientation:
    """What is known about the way round of square matrices.

    Attributes:
        of: The class of the base.
        contradicted: Name of a site whose shape says the opposite of what its adapter says.
    """

    of: BaseClass
    contradicted: str | None = None

    def transposed(self, spec: SiteSpec, name: str, matrix: tuple[int, int]) -> bool | str:
        """Return whether the matrix is `(in, out)`, or the reason why that cannot be said."""
        wide = (spec.out_features, spec.in_features)
        if matrix not in (wide, wide[::-1]):
            return f"its shape is {list(matrix)}, the adapter's update is {list(wide)}"
        may_be_wrong = spec.kind in {"linear", "conv1d"}
        if wide[0] != wide[1]:
            found = matrix != wide
            if found != spec.transposed and may_be_wrong:
                self.contradicted = self.contradicted or spec.name
            return found
        if spec.experts is not None and self.of.known:
            return spec.transposed or bool(self.of.transposed(name))
        if self.contradicted is None or not may_be_wrong:
            return spec.transposed
        said = self.of.transposed(name) if self.of.known else None
        if said is None:
            of = self.contradicted
            return f"it is square, and the adapter has the orientation of '{of}' wrong"
        return said


def place_site(
    state: SiteState, weight: float, name: str, entry: TensorEntry | None, way: Orientation
) -> list[Placed] | str:
    """Return where one site's terms go, or the reason why they go nowhere; empty: it is absent.

    `name` is the output's of its tensor and `weight` the mixing weight of the adapter. `entry` is
    the base's tensor, or the one that it is tied to, with the rows that the adapter adds to it.
    """
    if entry is not None:
        return _place_direct(state, weight, name, entry, way)
    if not way.of.known:
        return ""
    if state.spec.experts is not None:
        return _place_on_separate_experts(state, weight, name, way.of)
    return _place_in_stack(state, weight, name, way.of)


def _placed(
    state: SiteState,
    weight: float,
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

    With the subtraction of its frozen start, where it has one.
    """
    spec = replace(state.spec, experts=None, weight_shape=matrix, transposed=transposed)
    if rows is not None and transposed:
        spec = replace(spec, in_features=matrix[0])
    elif rows is not None:
        spec = replace(spec, out_features=matrix[0])
    terms = []
    for A, B, sign in state.pairs:
        a = A.reshape(-1, spec.in_features) if expert is None else A[expert]
        b = B.reshape(-1, spec.rank) if expert is None else B[expert]
        if rows is not None:
            a, b = (a[:, rows], b) if transposed else (a, b[rows])
        terms.append(Term(spec, a, b, sign * weight))
    variant, gain = VARIANTS[spec.variant], None
    if variant.gained:  # of one matrix, as what cannot have a gain was refused before
        gain = Gain(variant.gain, state.further, spec.spans)
    return Placed(name, entry, start, start + matrix[0], matrix[1], tuple(terms), gain)


def _place_direct(
    state: SiteState, weight: float, name: str, entry: TensorEntry, way: Orientation
) -> list[Placed] | str:
    spec, shape = state.spec, entry.shape
    stacked = spec.experts is not None
    transposed: bool | str
    if spec.kind == "parameter" and len(spec.weight_shape) > 2 + stacked:  # a matrix of many axes
        rows, columns = spec.matrix_shape
        matrix, transposed = (rows // (spec.experts or 1), columns), spec.transposed
        if shape != spec.weight_shape:
            transposed = f"its shape is {list(shape)}, the adapter's is {list(spec.weight_shape)}"
    elif len(shape) < 2 or (stacked and (len(shape) != 3 or shape[0] != spec.experts)):
        experts = f" for {spec.experts} experts" if stacked else ""
        return f"'{name}' has the shape {list(shape)}, which takes no low-rank update{experts}"
    else:
        matrix = matrix_of(shape[1:] if stacked else shape)
        transposed = way.transposed(spec, name, matrix)
    if isinstance(transposed, str):
        return f"'{name}': {transposed}"
    return [
        _placed(
            state,
            weight,
            name,
            entry,
            matrix,
            start=e * matrix[0],
            transposed=transposed,
            expert=e if stacked else None,
        )
        for e in range(spec.experts or 1)
    ]


def _place_on_separate_experts(
    state: SiteState, weight: float, name: str, of: BaseClass
) -> list[Placed] | str:
    """Cut an update of stacked experts into the per-expert tensors of the file."""
    spec, names, tensors = state.spec, of.separate(name), of.checkpoint.tensors
    if len(names) != spec.experts:
        found = f"'{name}' is not in the checkpoint, but for {len(names)} single experts"
        return found if names else ""
    n_parts = max(map(len, names))
    for e, expert in enumerate(names):
        if len(expert) < n_parts:
            return f"expert {e} is not complete in the checkpoint: of {n_parts} it has {expert}"
    if spec.slices is not None:
        return "slices of experts that the file keeps apart are not supported"
    first = names[0][0]
    shape = tensors[first].shape
    if len(shape) != 2:
        return f"'{first}' has the shape {list(shape)}, not that of a matrix"
    whole, update = (n_parts * shape[0], shape[1]), (spec.out_features, spec.in_features)
    if whole not in (update, update[::-1]):
        return (
            f"'{first}' and its neighbors make a matrix of {list(whole)}, the "
            f"adapter's update is {list(update)}"
        )
    # A before B where the update was made for the transposed stack (PEFT before 0.19).
    transposed, placed = whole != update, []
    for e, expert in enumerate(names):
        for part, one in enumerate(expert):
            if tensors[one].shape != shape:
                return f"'{one}' has another shape than '{first}'"
            rows = slice(part * shape[0], (part + 1) * shape[0])
            placed.append(
                _placed(
                    state,
                    weight,
                    one,
                    tensors[one],
                    (shape[0], shape[1]),
                    transposed=transposed,
                    expert=e,
                    rows=rows,
                )
            )
    return placed


def _place_in_stack(
    state: SiteState, weight: float, name: str, of: BaseClass
) -> list[Placed] | str:
    """Place the update of one expert, named apart, in its rows of a stack `(E, out, in)`."""
    place = of.place_of(name)
    entry = None if place is None else of.checkpoint.tensors.get(of(place.name))
    if place is None or place.expert is None or entry is None or len(entry.shape) != 3:
        return ""
    matrix = (state.spec.out_features, state.spec.in_features)
    n_experts, rows, cols = entry.shape
    if (rows, cols) != (place.n_parts * matrix[0], matrix[1]):
        return f"'{entry.name}' {list(entry.shape)} is not stacked as (experts, out, in)"
    if place.expert >= n_experts:
        return f"'{entry.name}' has {n_experts} experts, the adapter names number {place.expert}"
    start = place.expert * rows + place.part * matrix[0]
    return [_placed(state, weight, entry.name, entry, matrix, start=start)]
