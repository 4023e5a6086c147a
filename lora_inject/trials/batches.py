"""Join the batches of several trials, and split the outputs by trial."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lora_inject.errors import LayerError, StateError

Forward = Callable[[Any], Any]


class _WithoutRows:
    """Stands for a tensor of the outputs that has no row of any trial, such as a mean."""

    def __repr__(self) -> str:
        return "(a tensor without the rows of the batch)"


WITHOUT_ROWS = _WithoutRows()


class Joined(NamedTuple):
    """The batches of several trials as one.

    Attributes:
        batch: All rows one after the other.
        sizes: Rows of each trial.
        lengths: Positions of each trial's rows, where shorter rows are padded.
        longest: The most of them.
        widths: The positions in each tensor that has some, 0 for pictures.
    """

    batch: Any
    sizes: dict[str, int]
    lengths: dict[str, int]
    longest: int
    widths: tuple[int, ...]


def in_one_order(batches: Mapping[str, Any]) -> dict[str, Any]:
    """Return batches with each mapping as a dict, its entries in the order of the first batch.

    pytree looks into no other mapping, such as the BatchEncoding of a collator.
    """
    first = next(iter(batches.values()))
    order = {key: i for i, key in enumerate(first)} if isinstance(first, Mapping) else {}

    def as_dict(batch: Any) -> Any:
        if not isinstance(batch, Mapping):
            return batch
        return {key: batch[key] for key in sorted(batch, key=lambda k: order.get(k, len(order)))}

    return {name: as_dict(batch) for name, batch in batches.items()}


def copied(batch: Any) -> Any:
    """Return a batch that a forward or a loss may change."""
    return tree_map(lambda t: t.clone() if _has_rows(t) and not t.requires_grad else t, batch)


def size_of(batch: Any, whose: str) -> int:
    """Return the rows of a batch, which is equal in all its tensors."""
    shapes = {tuple(t.shape[:1]) for t in filter(_has_rows, tree_leaves(batch))}
    if len(shapes) != 1 or (0,) in shapes:
        problem = f"its tensors begin with {sorted(shapes)}" if shapes else "it holds no tensor"
        remedy = "Give tensors with one row an example"
        raise StateError(f"step, batch of {whose!r}", problem, remedy)
    return int(shapes.pop()[0])


def n_tokens(batch: Any) -> int:
    """Return rows times positions of the batch's first tensor."""
    first = next(filter(_has_rows, tree_leaves(batch)))
    return int(first.shape[:2].numel())


def joined_batch(batches: Mapping[str, Any]) -> Joined:
    """Concatenate the rows of all batches, padded to one length with zeros.

    Raises:
        StateError: The batches differ in structure, or in a dimension other than the first two.
    """
    sizes = {name: size_of(batch, name) for name, batch in batches.items()}
    trees = [tree_flatten(batch) for batch in batches.values()]
    if any(form != trees[0][1] for _, form in trees):
        raise StateError("step", "the batches of trials have other entries", "Give all the same")
    columns = [*zip(*(leaves for leaves, _ in trees), strict=True)]
    rows = [*map(_one_tensor, columns)]
    with_positions = [column for column in columns if _has_positions(column[0])]
    widths = {tuple(t.shape[1] for t in column) for column in with_positions}
    uneven = {each for each in widths if len({*each}) > 1}
    if len(uneven) > 1:
        lengths_of_all = " and ".join(map(str, sorted(uneven)))
        remedy = "Give all entries of a batch one length (a label for each token, or -100)"
        raise StateError(
            "step", f"the rows of the trials have the lengths {lengths_of_all}", remedy
        )
    joined = [t for t in rows if _has_positions(t)]
    positions = tuple(int(t.shape[1]) if t.dim() < 4 else 0 for t in joined)
    lengths = dict.fromkeys(batches, max(positions, default=1))
    if uneven:
        lengths = dict(zip(batches, uneven.pop(), strict=True))
    whole = tree_unflatten(rows, trees[0][1])
    return Joined(whole, sizes, lengths, max(lengths.values()), positions)


def _one_tensor(column: Sequence[Any]) -> Any:
    """Return one tensor of all rows; of entries without rows the one that all have."""
    first, problem = column[0], "a value without rows is one for all trials, and differs"
    if all(not _has_rows(each) and _is_same(each, first) for each in column):
        return first
    if all(_has_rows(each) and each.dtype == first.dtype for each in column):
        whole = list(column)
        if _has_positions(first) and len({t.shape[1] for t in column}) > 1:
            n = max(t.shape[1] for t in column)
            whole = [F.pad(t, (0, 0) * (t.dim() - 2) + (0, n - t.shape[1])) for t in column]
        try:
            return torch.cat(whole)
        except RuntimeError:
            problem = "their rows differ in shape"
    elif all(map(_has_rows, column)):
        problem = "their rows differ in dtype"
    found = " and ".join(dict.fromkeys(map(shown, column)))
    raise StateError("step", f"{found}: {problem}", "Give all trials rows of one shape and dtype")


class Form(NamedTuple):
    """How the outputs of a forward were seen to hold the rows.

    Attributes:
        left_out: Entries that are built in another way for other rows, such as a tuple with the
            features of each picture.
        padded: For each leaf, the axes that have the positions of padded rows; none for rows of one
            length.
    """

    left_out: frozenset[Any] = frozenset()
    padded: Sequence[Sequence[int]] = ()

    @classmethod
    def seen(cls, whole: Any, alone: Mapping[str, Any], of: Joined) -> Form:
        """Return the form of the outputs of a joined batch, beside those of each batch alone."""
        keys = whole if isinstance(whole, Mapping) else ()
        left_out = {
            k for k in keys if {_n_leaves(whole, k)} != {_n_leaves(o, k) for o in alone.values()}
        }
        form = cls(frozenset(left_out))
        shortest = min(of.lengths, key=of.lengths.__getitem__)
        pair = of.lengths[shortest], of.longest
        both = zip(leaves_of(form.kept(alone[shortest])), leaves_of(form.kept(whole)), strict=True)
        padded = [_longer_axes(one, other, pair) for one, other in both]
        return form._replace(padded=padded) if any(padded) else form

    def kept(self, outputs: Any) -> Any:
        """Return outputs of which what is left out is in the part of no trial."""
        kept = copy.copy(outputs) if self.left_out else outputs
        for key in self.left_out:
            kept[key] = WITHOUT_ROWS
        return kept

    def parted(self, outputs: Any, of: Joined) -> dict[str, Any]:
        """Return each trial's part of the outputs: a tensor without rows is in the part of none.

        Uses `split`, because the backward of a slice fills a tensor of full size for each trial.

        Args:
            outputs: Of the joined batch.
            of: The joined batch.

        Raises:
            StateError: No tensor has as many rows as the batch.
            LayerError: There are other leaves than the form is of.
        """
        kept = self.kept(outputs)
        if len(of.sizes) == 1:
            return dict.fromkeys(of.sizes, kept)
        leaves, structure = tree_flatten(kept)
        axes = self.padded or [()] * len(leaves)
        if len(axes) != len(leaves):
            problem = f"the forward returned {len(leaves)} values, and {len(axes)} at first"
            raise LayerError("step", problem, "Give rows of one length")
        columns = [_split(leaf, of, each) for leaf, each in zip(leaves, axes, strict=True)]
        if not any(isinstance(column[0], Tensor) for column in columns):
            raise StateError(
                "step",
                f"of what the forward returned, {', '.join(map(shown, leaves))}, no tensor has the "
                f"{sum(of.sizes.values())} rows of the batch",
                "Give a forward that returns one row of outputs for each row, without a loss",
            )
        parts = (tree_unflatten(list(part), structure) for part in zip(*columns, strict=True))
        return dict(zip(of.sizes, parts, strict=True))


def leaves_of(tree: Any) -> list[Any]:
    """Return the leaves of a tree, None among them."""
    leaves: list[Any] = tree_flatten(tree)[0]
    return leaves


def _n_leaves(outputs: Any, key: Any) -> int:
    """Return of how many values an entry consists."""
    return len(leaves_of(outputs[key])) if key in outputs else 0


def _longer_axes(one: Any, other: Any, pair: tuple[int, int]) -> list[int]:
    """Return the axes whose lengths in two leaves are those of shorter and of longer rows."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.dim() != other.dim():
        return []
    both = [*zip(one.shape, other.shape, strict=True)]
    return [axis for axis in range(1, len(both)) if both[axis] == pair and pair[0] < pair[1]]


def _split(output: Any, of: Joined, padded: Iterable[int]) -> list[Any]:
    """Return each trial's part of one leaf, without padding on the axes that have it."""
    sizes = list(of.sizes.values())
    if not isinstance(output, Tensor):
        return [output] * len(sizes)
    if not output.dim() or len(output) != sum(sizes):
        return [WITHOUT_ROWS] * len(sizes)
    parts = list(torch.split(output, sizes))
    for axis in padded:
        parts = [t.narrow(axis, 0, n) for t, n in zip(parts, of.lengths.values(), strict=True)]
    return parts


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _has_positions(leaf: Any) -> bool:
    """Whether a second dimension is that of tokens, and not of features."""
    several = _has_rows(leaf) and leaf.dim() > 1
    return several and (leaf.dim() > 2 or not leaf.is_floating_point())


def _is_same(one: Any, other: Any) -> bool:
    """Whether two entries without rows have one value, as far as that is known."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    known = type(one) is type(other) and isinstance(one, (bool, int, float, str, bytes))
    return one is other or (known and one == other)


def shown(leaf: Any) -> str:
    """Return what an error says of an entry."""
    if not isinstance(leaf, Tensor):
        return f"{type(leaf).__name__} {leaf!r:.40}"
    shape = tuple(leaf.shape) if leaf.dim() else f"({leaf.item()})"
    return f"{type(leaf).__name__}{shape} of {leaf.dtype}"


def plain_forward(model: nn.Module) -> Forward:
    """Return a call of a model with a batch: by keyword without `labels`, or by position."""

    def forward(batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return model(**{key: value for key, value in batch.items() if key != "labels"})
        return model(*batch) if isinstance(batch, Sequence) else model(batch)

    return forward
