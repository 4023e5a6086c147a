"""Updates chosen by a tensor: for compiled graphs, in which an adapter's name is a constant.

All adapters of a layer are stacked, and numbers that come in as a tensor pick from the
stack. Another choice is then other data for the same graph, and nothing is compiled again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_inject.functional.factors import Factors
from lora_inject.functional.routed import bank


def chosen_factors(
    choice: Tensor,
    numbers: Sequence[int],
    adapters: Sequence[Sequence[Factors]],
    out: int,
    dtype: torch.dtype,
) -> Factors:
    """Return one update that equals those of the adapters that a tensor names.

    Adapters that are not chosen do not reach the output, not even where they hold NaN; where they
    require a gradient, it is zero.

    Args:
        choice: `(k, 2)`, float64: the number and the weight of each chosen adapter. Numbers that
            this layer does not know count for nothing.
        numbers: The numbers of this layer's adapters.
        adapters: The updates of each of them, all with the same dropout.
        out: Width of the layer's output.
        dtype: What to compute in.

    Returns:
        A `(k * R, in)` and B `(out, k * R)`, where R is the largest rank; scale and weights in B.

    Examples:
        >>> A, B = torch.randn(2, 4), torch.randn(6, 2)
        >>> stack = [[Factors(A + 1, B, 1.0)], [Factors(A, B, 0.5)]]
        >>> chosen = torch.tensor([[8.0, 3.0]], dtype=torch.float64)
        >>> one = chosen_factors(chosen, [7, 8], stack, 6, torch.float32)
        >>> torch.allclose(one.B @ one.A, 1.5 * B @ A)
        True
    """
    A_bank, B_bank = bank(adapters, out, dtype)
    rows = chosen_rows(choice[:, 0], numbers)
    index, here = (rows - 1).clamp(min=0), (rows > 0)[:, None, None]
    weights = choice[:, 1].to(dtype)[:, None, None]
    A = torch.where(here, A_bank.index_select(0, index), 0)
    B = torch.where(here, B_bank.index_select(0, index) * weights, 0)
    p = adapters[0][0].dropout
    return Factors(A.flatten(0, 1), B.transpose(0, 1).flatten(1), 1.0, dropout=p)


def chosen_rows(chosen: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return `(k,)`, int64: 1 + the place of each chosen number among `numbers`, 0 for strangers.

    Args:
        chosen: `(k,)`, any dtype.
        numbers: The numbers of a layer's adapters.

    Examples:
        >>> chosen_rows(torch.tensor([5.0, -1.0, 4.0]), [4, 5]).tolist()
        [2, 0, 1]
    """
    # Compared with numbers of Python: a tensor of them would be copied to the device each time.
    rows = torch.zeros_like(chosen, dtype=torch.int64)
    for place, number in enumerate(numbers, 1):
        rows = torch.where(chosen == number, place, rows)
    return rows
