"""Other values for the rows of one trial, to see whether another trial's outputs depend on them.

The values must be such that a model can take them. A floating-point number is moved within its
range. Of whole numbers, which may be tokens, masks or positions, only those that a batch holds are
known to be possible, and 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lora_inject.trees import tree_leaves, tree_map
from lora_inject.trials.batches import Joined

_Way = Callable[[Tensor], Tensor]
"""Takes whole numbers, rows first, and returns others of the same shape."""


def with_other_rows(of: Joined, name: str) -> Iterator[Joined]:
    """Yield a joined batch with other rows of one trial, in each way that changes something.

    For example the tokens `[[5, 6], [7, 8]]` become `[[5, 6], [5, 6]]`, then `[[5, 5], [5, 5]]`,
    then zeros.
    """
    for way in (_first_row, _first_value, torch.zeros_like):
        batch = tree_map(lambda leaf, way=way: _changed(leaf, of, name, way), of.batch)
        both = zip(tree_leaves(of.batch), tree_leaves(batch), strict=True)
        if any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in both):
            yield of._replace(batch=batch)


def _changed(leaf: object, of: Joined, name: str, way: _Way) -> object:
    """Return a leaf of a batch with other values in the rows, or packed tokens, of one trial."""
    dim = int(of.packed)
    if not isinstance(leaf, Tensor) or leaf.dim() <= dim:
        return leaf
    names = list(of.sizes)
    start = sum(of.sizes[before] for before in names[: names.index(name)])
    changed = leaf.clone()
    rows = changed.narrow(dim, start, of.sizes[name]).movedim(dim, 0)
    if leaf.is_floating_point():
        rows.copy_(0.5 * rows.float() + 0.1)
    else:
        rows.copy_(way(rows.clone()))
    return changed


def _first_row(rows: Tensor) -> Tensor:
    return rows[:1].expand_as(rows)


def _first_value(rows: Tensor) -> Tensor:
    return rows.flatten()[0].expand_as(rows)
