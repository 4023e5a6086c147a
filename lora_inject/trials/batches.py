"""Join the batches of several trials, and split the outputs by trial."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_inject.errors import LayerError, StateError
from lora_inject.trees import Structure, tree_flatten, tree_leaves, tree_unflatten

Forward = Callable[[Any], Any]


class _WithoutRows:
    """Stands for a tensor of the outputs that has no row of any trial, such as a mean."""

    def __repr__(self) -> str:
        return "(a tensor without the rows of the batch)"


WITHOUT_ROWS = _WithoutRows()


class Joined(NamedTuple):
    """The batches of several trials as one.

    Attributes:
        batch: All rows one after the other; of packed batches, all tokens of one row.
        sizes: Rows, or tokens, of each trial.
        lengths: Positions of each trial's rows, where shorter rows are padded.
        longest: The most of them.
        widths: The positions in each tensor that has some, 0 for pictures.
        packed: Whether the batches are packed.
    """

    batch: Any
    sizes: dict[str, int]
    lengths: dict[str, int]
    longest: int
    widths: tuple[int, ...]
    packed: bool


def in_one_order(batches: Mapping[str, Any]) -> dict[str, Any]:
    """Return batches with each mapping as a dict, its entries in the order of the first batch.

    pytree looks into no other mapping, such as the BatchEncoding of a collator.
    """
    first = next(iter(batches.values()))
    order = dict.fromkeys(first) if isinstance(first, Mapping) else {}

    def as_dict(batch: Any) -> Any:
        if not isinstance(batch, Mapping):
            return batch
        return {key: batch[key] for key in (order if batch.keys() == order.keys() else batch)}

    return {name: as_dict(batch) for name, batch in batches.items()}


def size_of(batch: Any, whose: str, *, packed: bool = False) -> int:
    """Return the rows of a batch, or its tokens if it is packed: equal in all its tensors."""
    shapes = {
        t.shape[: 1 + packed] for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()
    }
    if packed and not (len(shapes) == 1 and len(shape := min(shapes)) == 2 and shape[0] == 1):
        problem = f"its tensors have the shapes {sorted(map(tuple, shapes))}"
        raise StateError(f"step, batch of {whose!r}", problem, "Packed, each is (1, tokens, ...)")
    sizes = {shape[-1] for shape in shapes}
    if len(sizes) != 1 or not all(sizes):
        problem = f"its tensors have {sorted(sizes)} rows" if sizes else "it holds no tensor"
        raise StateError(
            f"step, batch of {whose!r}", problem, "Give tensors with one row an example"
        )
    return int(sizes.pop())


def n_tokens(batch: Any) -> int:
    """Return rows times positions of the batch's first tensor."""
    first = next(filter(_has_rows, tree_leaves(batch)))
    return int(first.shape[:2].numel())


def joined_batch(batches: Mapping[str, Any], *, packed: bool = False) -> Joined:
    """Concatenate the rows of all batches, padded to one length with zeros; packed, their tokens.

    Raises:
        StateError: The batches differ in structure, or in a dimension other than the first two.
    """
    sizes = {name: size_of(batch, name, packed=packed) for name, batch in batches.items()}
    columns, structure = _columns_of(batches)
    widths = {tuple(t.shape[1] for t in c) for c in columns if _has_rows(c[0]) and c[0].dim() > 1}
    uneven = None if packed else _lengths(widths, list(batches))
    if uneven is not None and not any(map(_has_positions, columns)):
        raise StateError(
            "step",
            f"the rows of the trials differ: {', '.join(map(str, uneven.values()))} features",
            "Give all trials rows of one shape",
        )
    rows = [_one_tensor(column, packed) for column in columns]
    with_positions = [t for t in rows if _has_rows(t) and t.dim() > 1]
    with_positions = [t for t in with_positions if t.dim() > 2 or not t.is_floating_point()]
    positions = tuple(int(t.shape[1]) if t.dim() < 4 else 0 for t in with_positions)
    lengths = uneven or dict.fromkeys(batches, max(positions, default=1))
    longest = max(lengths.values())
    return Joined(tree_unflatten(rows, structure), sizes, lengths, longest, positions, packed)


def _columns_of(batches: Mapping[str, Any]) -> tuple[list[list[Any]], Structure]:
    """Return for each entry the tensors of all batches, one value if it has no rows."""
    (first, batch), *others = batches.items()
    leaves, structure = tree_flatten(batch)
    columns = [[leaf] for leaf in leaves]
    for name, other in others:
        asked = f"step, batches of {first!r} and {name!r}"
        other_leaves, other_structure = tree_flatten(other)
        if other_structure != structure:
            problem = "their structures differ"
            raise StateError(asked, problem, "Give all trials batches with the same entries")
        for column, leaf in zip(columns, other_leaves, strict=True):
            if _has_rows(leaf) or _has_rows(column[0]):
                _check_joins(column[0], leaf, asked)
                column.append(leaf)
            else:
                _check_shared(column[0], leaf, asked)
    return columns, structure


def _check_joins(one: Any, other: Any, asked: str) -> None:
    if not _joins(one, other):
        problem = f"their rows differ: {_shown(one)} and {_shown(other)}"
        raise StateError(asked, problem, "Pad the rows of one step to one shape")


def _check_shared(one: Any, other: Any, asked: str) -> None:
    if not _is_same(other, one):
        raise StateError(
            asked,
            f"an entry without rows differs: {_shown(one)} and {_shown(other)}",
            "The forward gets one for all trials: give a tensor with one row an "
            "example, or leave it out of the batches",
        )


def _lengths(widths: Iterable[tuple[int, ...]], names: Sequence[str]) -> dict[str, int] | None:
    """Return the positions of each trial's rows if they differ, in the same way in all tensors."""
    several = {lengths for lengths in widths if len(set(lengths)) > 1}
    if len(several) > 1:
        shown = " and ".join(map(str, sorted(several)))
        remedy = "Give all entries of a batch one length (a label for each token, or -100), or pad "
        remedy += "each entry to one length for all trials"
        raise StateError("step", f"the rows of the trials have the lengths {shown}", remedy)
    return dict(zip(names, several.pop(), strict=True)) if several else None


def _has_positions(column: Sequence[Any]) -> bool:
    """Whether a second dimension that differs is that of tokens, and not of features."""
    one = column[0]
    if not _has_rows(one) or one.dim() < 2 or len({t.shape[1] for t in column}) == 1:
        return False
    return one.dim() > 2 or not one.is_floating_point()


def _one_tensor(column: Sequence[Any], packed: bool) -> Any:
    if not _has_rows(column[0]):
        return column[0]
    if packed:
        return torch.cat(list(column), dim=1)
    longest = max(t.shape[1:2] for t in column)
    return torch.cat([t if t.shape[1:2] == longest else _padded(t, longest[0]) for t in column])


def _padded(t: Tensor, n: int) -> Tensor:
    return F.pad(t, (0, 0) * (t.dim() - 2) + (0, n - t.shape[1]))


def without(outputs: Any, keys: Iterable[Any]) -> Any:
    """Return outputs of which some entries are in the part of no trial."""
    if not (keys := [*keys]):
        return outputs
    kept = copy.copy(outputs)
    for key in keys:
        kept[key] = WITHOUT_ROWS
    return kept


def parted(outputs: Any, of: Joined, padded: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
    """Return each trial's part of the outputs: a tensor without rows is in the part of none.

    Uses `split`, because the backward of a slice fills a tensor of full size for each trial.

    Args:
        outputs: Of the joined batch.
        of: The joined batch.
        padded: For each leaf of the outputs, the axes that have the positions of padded rows.

    Raises:
        StateError: No tensor has as many rows, or tokens, as the batch.
        LayerError: There are other leaves than `padded` is for.
    """
    if len(of.sizes) == 1:
        return dict.fromkeys(of.sizes, outputs)
    leaves, structure = tree_flatten(outputs)
    axes = padded or [()] * len(leaves)
    if len(axes) != len(leaves):
        problem = f"the forward returned {len(leaves)} values, and {len(axes)} at first"
        raise LayerError("step", problem, "Give rows of one length")
    columns = [_split(leaf, of, each) for leaf, each in zip(leaves, axes, strict=True)]
    if not any(isinstance(column[0], Tensor) for column in columns):
        raise StateError(
            "step",
            f"of what the forward returned, {', '.join(map(_shown, leaves))}, no tensor has the "
            f"{sum(of.sizes.values())} {'tokens' if of.packed else 'rows'} of the batch",
            "Give a forward that returns one row of outputs for each row, without a loss",
        )
    parts = zip(*columns, strict=True)
    return {
        name: tree_unflatten(list(part), structure)
        for name, part in zip(of.sizes, parts, strict=True)
    }


def _split(output: Any, of: Joined, padded: Sequence[int]) -> list[Any]:
    """Return each trial's part of one leaf, without padding on the axes that have it."""
    sizes, dim = list(of.sizes.values()), int(of.packed)
    if not isinstance(output, Tensor):
        return [output] * len(sizes)
    if output.dim() <= dim or output.shape[dim] != sum(sizes):
        return [WITHOUT_ROWS] * len(sizes)
    parts = list(torch.split(output, sizes, dim))
    for axis in padded:
        both = zip(parts, of.lengths.values(), strict=True)
        parts = [part.narrow(axis, 0, n) for part, n in both]
    return parts


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _joins(one: Any, other: Any) -> bool:
    """Whether the rows of two entries can be those of one tensor."""
    if not _has_rows(one) or not _has_rows(other) or one.dtype != other.dtype:
        return False
    return bool(one.dim() == other.dim() and one.shape[2:] == other.shape[2:])


def _is_same(one: Any, other: Any) -> bool:
    """Whether two entries without rows have one value, as far as that is known."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    known = type(one) is type(other) and isinstance(one, (bool, int, float, str, bytes))
    return one is other or (known and one == other)


def _shown(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return f"{type(leaf).__name__} {leaf!r:.40}"
    shown = tuple(leaf.shape) if leaf.dim() else f"({leaf.item()})"
    return f"{type(leaf).__name__}{shown} of {leaf.dtype}"


def plain_forward(model: nn.Module) -> Forward:
    """Return a call of a model with a batch: by keyword without `labels`, or by position."""

    def forward(batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return model(**{key: value for key, value in batch.items() if key != "labels"})
        if isinstance(batch, Sequence):
            return model(*batch)
        return model(batch)

    return forward
