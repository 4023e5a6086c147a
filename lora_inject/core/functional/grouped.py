"""Products of stacked experts whose rows are sorted by expert: one call for all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.core.functional.weight import LowRank


def grouped_product(
    stack: LowRank, multiply: Callable[..., Tensor], x: Tensor, offs: Tensor
) -> Tensor:
    """Return the product of groups of rows, each with a matrix of its own.

    `multiply` is called as `torch._grouped_mm` is: x `(rows, m)`, sorted by group, a stack of
    matrices, and the end of each group. Rows behind the last are what it leaves there.
    """
    y = multiply(x, stack.base, offs=offs)
    for left, right, scale in stack.terms:
        # The kernels need rows of a multiple of 16 bytes, which a small rank does not give.
        missing = -left.shape[-1] % max(1, 16 // y.element_size())
        h = _factor_product(multiply, x, left, (0, missing), offs)
        update = _factor_product(multiply, h, right, (0, 0, 0, missing), offs)
        y = torch.add(y, update, alpha=scale)
    return y


def _factor_product(
    multiply: Callable[..., Tensor],
    x: Tensor,
    stack: Tensor,
    padding: tuple[int, ...],
    offs: Tensor,
) -> Tensor:
    """Return the product with a factor of each group, or with the one that all groups share."""
    is_one = len(stack) > 1 and stack.stride(0) == 0
    stack = F.pad(stack[:1] if is_one else stack, padding).to(x.dtype)
    return torch.matmul(x, stack[0]) if is_one else multiply(x, stack, offs=offs)
