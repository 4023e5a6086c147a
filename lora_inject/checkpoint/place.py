"""Where one adapter's updates land: tensors, rows, and the way round.

Whatever the adapter and the file each call a weight, and however they stack it, an
update ends as low-rank terms on a range of rows of one tensor seen as a matrix. A plain site is
one such range; a bank of experts is one for each expert, in one tensor or in many. Shapes decide
the orientation; only a square matrix needs to be told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from lora_inject.adapter.state import SiteState
from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.functional import Term
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
    """

    tensor: str
    source: TensorEntry
    start: int
    stop: int
    n_cols: int
    terms: tuple[Term, ...]


def matrix_of(shape: tuple[int, ...], *, stacked: bool = False) -> tuple[int, int]:
    """Return the shape of a tensor seen as one matrix, in its own memory order.

    Args:
        shape: Its dimensions.
        stacked: Whether it is a stack of matrices rather than one weight of many dimensions.

    Examples:
        >>> matrix_of((8, 3, 3, 3)), matrix_of((4, 6, 5), stacked=True), matrix_of((7,))
        ((8, 27), (24, 5), (1, 7))
    """
    if len(shape) < 2:
        return 1, math.prod(shape)
    if stacked:
        return math.prod(shape[:-1]), shape[-1]
    return shape[0], math.prod(shape[1:])


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
        if wide[0] != wide[1]:
            found = matrix != wide
            if found != spec.transposed and spec.kind in {"linear", "conv1d"}:
                self.contradicted = self.contradicted or spec.name
            return found
        if spec.experts is not None and self.of.known:
            return spec.transposed or bool(self.of.transposed(name))
        if self.contradicted is None or spec.kind not in {"linear", "conv1d"}:
            return spec.transposed
        said = self.of.transposed(name) if self.of.known else None
        if said is None:
            of = self.contradicted
            return f"it is square, and the adapter has the orientation of '{of}' wrong"
        return said


def place_site(
    state: SiteState, weight: float, name: str, grown: TensorEntry | None, way: Orientation
) -> list[Placed] | str:
    """Find the rows that one site's update belongs to.

    Args:
        state: The site and its tensors.
        weight: Mixing weight of the adapter.
        name: The tensor's name, as the base has it.
        grown: The tensor with the rows that the adapter adds to it, where it does.
        way: Orientation of square matrices.

    Returns:
        Where the terms go, or the reason why they go nowhere.
    """
    entry = grown or way.of.checkpoint.tensors.get(name)
    if entry is not None:
        return _place_direct(state, weight, name, entry, way)
    if not way.of.known:
        return f"'{name}' is not in the checkpoint"
    if state.spec.experts is not None:
        return _place_on_separate_experts(state, weight, name, way.of)
    return _place_in_stack(state, weight, name, way.of)


def _terms(state: SiteState, weight: float, spec: SiteSpec, expert: int | None) -> tuple[Term, ...]:
    """Return the site's update, and the subtraction of its frozen start where it has one."""

    def pick(t: Tensor, last: int) -> Tensor:
        return t.reshape(-1, last) if expert is None else t[expert]

    def term(A: Tensor, B: Tensor, w: float) -> Term:
        return Term(spec, pick(A, spec.in_features), pick(B, spec.rank), w)

    return tuple(term(A, B, sign * weight) for A, B, sign in state.pairs)


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
    plain = replace(spec, experts=None, weight_shape=matrix, transposed=transposed)
    rows = matrix[0]
    return [
        Placed(
            name,
            entry,
            e * rows,
            (e + 1) * rows,
            matrix[1],
            _terms(state, weight, plain, e if stacked else None),
        )
        for e in range(spec.experts or 1)
    ]


def _place_on_separate_experts(
    state: SiteState, weight: float, name: str, of: BaseClass
) -> list[Placed] | str:
    """Cut an update of stacked experts into the per-expert tensors of the file."""
    names = of.separate(name)
    if len(names) != state.spec.experts:
        found = f", but for {len(names)} single experts" if names else ""
        return f"'{name}' is not in the checkpoint{found}"
    return _cut(state, weight, names, of.checkpoint.tensors)


def _cut(
    state: SiteState, weight: float, names: list[list[str]], tensors: Mapping[str, TensorEntry]
) -> list[Placed] | str:
    spec, placed = state.spec, []
    n_parts = max(map(len, names))
    for e, expert in enumerate(names):
        if len(expert) < n_parts:
            return f"expert {e} is not complete in the checkpoint: of {n_parts} it has {expert}"
    if spec.slices is not None:
        return "slices of experts that the file keeps apart are not supported"
    first = tensors[names[0][0]].shape
    if len(first) != 2:
        return f"'{names[0][0]}' has the shape {list(first)}, not that of a matrix"
    height, width = len(names[0]) * first[0], first[1]
    # A before B where the update was made for the transposed stack (PEFT before 0.19).
    if (spec.out_features, spec.in_features) == (height, width):
        transposed = False
    elif (spec.in_features, spec.out_features) == (height, width):
        transposed = True
    else:
        return (
            f"'{names[0][0]}' and its neighbors make a matrix of {[height, width]}, the "
            f"adapter's update is {[spec.out_features, spec.in_features]}"
        )
    for e, expert in enumerate(names):
        for part, name in enumerate(expert):
            if tensors[name].shape != first:
                return f"'{name}' has another shape than '{names[0][0]}'"
            rows = slice(part * first[0], (part + 1) * first[0])
            terms = _cut_terms(state, weight, e, rows, transposed, first)
            placed.append(Placed(name, tensors[name], 0, first[0], first[1], terms))
    return placed


def _cut_terms(
    state: SiteState,
    weight: float,
    expert: int,
    rows: slice,
    transposed: bool,
    shape: tuple[int, ...],
) -> tuple[Term, ...]:
    n_rows = rows.stop - rows.start
    spec = replace(
        state.spec,
        experts=None,
        weight_shape=shape,
        transposed=transposed,
        **{"in_features" if transposed else "out_features": n_rows},
    )
    return tuple(
        Term(spec, A[expert][:, rows], B[expert], sign * weight)
        if transposed
        else Term(spec, A[expert], B[expert][rows], sign * weight)
        for A, B, sign in state.pairs
    )


def _place_in_stack(
    state: SiteState, weight: float, name: str, of: BaseClass
) -> list[Placed] | str:
    """Place the update of one expert, named apart, in its rows of a stack `(E, out, in)`."""
    place = of.place_of(name)
    entry = None if place is None else of.checkpoint.tensors.get(of(place.name))
    if place is None or place.expert is None or entry is None or len(entry.shape) != 3:
        return f"'{name}' is not in the checkpoint"
    spec = state.spec
    n_experts, rows, cols = entry.shape
    if (rows, cols) != (place.n_parts * spec.out_features, spec.in_features):
        return f"'{entry.name}' {list(entry.shape)} is not stacked as (experts, out, in)"
    if place.expert >= n_experts:
        return f"'{entry.name}' has {n_experts} experts, the adapter names number {place.expert}"
    start = place.expert * rows + place.part * spec.out_features
    plain = replace(
        spec, weight_shape=(spec.out_features, spec.in_features), transposed=False, experts=None
    )
    terms = _terms(state, weight, plain, None)
    return [Placed(entry.name, entry, start, start + spec.out_features, cols, terms)]
