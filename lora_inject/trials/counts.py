"""Whether a layer whose input does not show the rows gets tokens of whole rows.

An input `(tokens, in)` holds the tokens of whole rows, one row after the other, or tokens that the
model has picked by their values, as an expert that is a layer of its own gets them. Of picked
tokens nothing tells whose they are. What can be seen is their number for each row.

The hypothesis: this number follows from the shape of the batch alone. It is as many as there are
positions; or always the same; or always as many more or fewer than there are positions.

    passes   rows of 5, then 7 positions; the layer gets 5, then 7 tokens for each row (all)
    passes   rows of 5, then 7 positions; the layer gets 8, then 10 (three of the model's own)
    passes   rows of 5, then 7 positions; the layer gets 1, then 1 (the first of each row)
    refused  rows of 4, then 4 positions; the layer gets 2, then 3 (those that an expert picked)

What picks tokens may get such a number by chance. So where the number is not that of the positions,
the check of a forward runs it once more on rows that are all alike, and on rows of one repeated
token (`isolation._check_counts`): an expert then gets all tokens or none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_inject.errors import LayerError
from lora_inject.trees import tree_leaves

REMEDY = (
    "Use a forward whose layers get whole rows, one after the other (experts as one stack, not as "
    "layers of their own), or train that adapter by itself"
)


class Counts:
    """The numbers of tokens that layers had in the checks of a forward.

    Attributes:
        learns: Whether numbers are noted now; else they are compared with those.
        unsure: Whether one was noted that picked tokens could have had by chance.
    """

    def __init__(self) -> None:
        self.learns = self.unsure = False
        self._noted: dict[nn.Module, list[_Number]] = {}
        self._right: set[Any] = set()

    def check(self, layer: nn.Module, per_row: int, widths: tuple[int, ...], asked: str) -> None:
        """Refuse a number that does not follow from the `widths_of` the batch as it did before.

        Raises:
            LayerError: It is another one.
        """
        key = (layer, per_row, widths)
        if key in self._right:
            return
        noted = self._noted.setdefault(layer, [])
        if not per_row and not noted:  # the layer has not had a token yet
            return
        number = _Number(per_row, widths)
        if not any(number.follows_like(other) for other in noted):
            is_surprise = bool(noted) or not number.is_all
            if is_surprise and not self.learns:
                problem = f"a {type(layer).__name__} got {per_row} tokens for each row, which does "
                problem += "not follow from the shape of the batch: the model may have picked them"
                raise LayerError(asked, problem, REMEDY)
            noted.append(number)
            self.unsure |= not number.is_all
        self._right.add(key)


class _Number(NamedTuple):
    """How many tokens a layer gets for each row of a batch with such `widths_of`."""

    per_row: int
    widths: tuple[int, ...]

    @property
    def is_all(self) -> bool:
        """Whether the layer gets as many tokens as a row has positions."""
        return self.per_row == max(self.widths, default=1)

    def follows_like(self, other: _Number) -> bool:
        """Whether both are one number, or equally far from the width of one tensor."""
        if self.per_row == other.per_row:
            return True
        both = zip(self.widths, other.widths, strict=False)
        return any(self.per_row - mine == other.per_row - its for mine, its in both)


def widths_of(batch: Any) -> tuple[int, ...]:
    """Return the number of positions in each tensor of a batch that has them, 0 for pictures."""
    tensors = (t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim() > 1)
    with_positions = (t for t in tensors if t.dim() > 2 or not t.is_floating_point())
    return tuple(t.shape[1] if t.dim() < 4 else 0 for t in with_positions)
