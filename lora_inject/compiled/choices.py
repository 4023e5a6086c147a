"""Adapters that a tensor chooses: their numbers, and one update that equals the chosen ones.

In a compiled graph an adapter's name would be a constant, and each switch would compile again.
Numbers in an input tensor are only other data for the same graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_inject.core.functional.factors import Update
from lora_inject.core.functional.torch_inside import constant_in_graphs
from lora_inject.rows.bank import stacked

_NUMBERS: dict[str, int] = {}


@constant_in_graphs
def number_of(adapter: str) -> int:
    """Return the number that stands for an adapter's name in tensors, in this process."""
    return _NUMBERS.setdefault(adapter, len(_NUMBERS))


def chosen_factors(
    choice: Tensor,
    numbers: Sequence[int],
    adapters: Sequence[Sequence[Update]],
    out: int,
    dtype: torch.dtype,
) -> Update:
    """Return one update that equals those of the adapters that a tensor names.

    `choice` is `(k, 2)`, float64: number and weight of each chosen adapter; `numbers` are those of
    this layer's adapters, which all have the same dropout. Adapters that are not chosen do not
    reach the output, not even where they hold NaN; where they require a gradient, it is zero.
    """
    A_bank, B_bank, scale = stacked(adapters, out, dtype)
    rows = chosen_rows(choice[:, 0], numbers)
    index, here = (rows - 1).clamp(min=0), (rows > 0)[:, None, None]
    weights = choice[:, 1].to(dtype)[:, None, None]
    A = torch.where(here, A_bank.index_select(0, index), 0)
    B = torch.where(here, B_bank.index_select(0, index) * weights, 0)
    p = adapters[0][0].dropout
    return Update(A.flatten(0, 1), B.transpose(0, 1).flatten(1), scale, dropout=p)


def chosen_rows(chosen: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return `(k,)`, int64: 1 + the place of each chosen number among `numbers`, 0 for strangers.

    Examples:
        >>> chosen_rows(torch.tensor([5.0, -1.0, 4.0]), [4, 5]).tolist()
        [2, 0, 1]
    """
    # Compared with numbers of Python: a tensor of them would be copied to the device each time.
    rows = torch.zeros_like(chosen, dtype=torch.int64)
    for place, number in enumerate(numbers, 1):
        rows = torch.where(chosen == number, place, rows)
    return rows
