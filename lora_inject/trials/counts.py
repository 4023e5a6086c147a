"""How many tokens of each row a layer gets whose input does not show the rows.

An input `(tokens, in)` holds the tokens of whole rows, or those that the model has picked by their
values, as an expert gets them that is a layer of its own. Of picked ones nothing tells whose they
are. So the number for each row must follow from the shapes of the batch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_inject.errors import LayerError

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
        self._known: dict[nn.Module, list[tuple[int, ...]]] = {}
        self._right: set[Any] = set()

    def check(self, layer: nn.Module, per_row: int, widths: tuple[int, ...], asked: str) -> None:
        """Refuse a number that does not follow from the `widths_of` the batch as it did before.

        Raises:
            LayerError: It is another one.
        """
        if (key := (layer, per_row, widths)) in self._right:
            return
        known = self._known.setdefault(layer, [])
        if not (per_row or known):
            return
        # As many as positions are all tokens. Else the number stays, or its distance to a width.
        sure = per_row == max(widths, default=1)
        over = tuple(per_row - width for width in (0, *widths))
        if not any(a == b for one in known for a, b in zip(one, over, strict=True)):
            if not self.learns and (known or not sure):
                found = f"a {type(layer).__name__} got {per_row} tokens for each row, which does "
                found += "not follow from the shape of the batch: the model may have picked them"
                raise LayerError(asked, found, REMEDY)
            known.append(over)
            self.unsure |= not sure
        self._right.add(key)


def widths_of(batch: Any) -> tuple[int, ...]:
    """Return the number of positions in each tensor of a batch that has them, 0 for pictures."""
    tensors = (t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim() > 1)
    with_positions = (t for t in tensors if t.dim() > 2 or not t.is_floating_point())
    return tuple(t.shape[1] if t.dim() < 4 else 0 for t in with_positions)
