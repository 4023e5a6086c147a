"""Products with a weight and its updates, without forming their sum.

`x (W + s L R) = x W + s (x L) R`. The second product is as thin as the rank, and its
gradients are those of thin matrices: nothing of the size of the weight is made, forward or
backward. A product with one matrix is `functional.linear`, which is faster still; what is here are
products with stacks of them, the experts of a mixture.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.functional.factors import Factors, without_autocast
from lora_inject.functional.linear import linear
from lora_inject.functional.weight import LowRank

Grouped = Callable[..., Tensor]


def product_from_right(x: Tensor, value: LowRank, bias: Tensor | None = None) -> Tensor:
    """Return `x @ value + bias`, as `torch.matmul` gives it; a bias comes with one matrix only."""
    base = value.base
    if base.dim() == 2:
        updates = [Factors(left.mT, right.mT, scale) for left, right, scale in value.terms]
        stored_as_out_in = base.mT.is_contiguous()
        weight = base.mT if stored_as_out_in else base
        return linear(
            x, weight, bias, updates, transposed=not stored_as_out_in, float32=value.float32
        )
    y = torch.matmul(x, base)
    with without_autocast(y) or nullcontext():
        x = x.to(y.dtype)
        for left, right, scale in value.terms:
            y = _add(y, torch.matmul(x, left.to(y.dtype)), right.to(y.dtype), scale)
    return y


def product_from_left(value: LowRank, x: Tensor) -> Tensor:
    """Return `value @ x` for x `(..., n, k)`, as `torch.matmul` gives it."""
    y = torch.matmul(value.base, x)
    with without_autocast(y) or nullcontext():
        x = x.to(y.dtype)
        for left, right, scale in value.terms:
            y = _add(y, left.to(y.dtype), torch.matmul(right.to(y.dtype), x), scale)
    return y


def looked_up(value: LowRank, ids: Tensor, padding_idx: int | None) -> Tensor:
    """Return `F.embedding(ids, value, padding_idx)`."""
    y = F.embedding(ids, value.base, padding_idx)
    for left, right, scale in value.terms:
        update = F.embedding(ids, left) @ right
        if padding_idx is not None:
            update = torch.where((ids == padding_idx).unsqueeze(-1), update.detach(), update)
        y = torch.add(y.to(update.dtype), update, alpha=scale).to(y.dtype)
    return y


def _add(y: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    if y.dim() == left.dim() == right.dim() == 3:
        return torch.baddbmm(y, left, right, alpha=scale)
    return torch.add(y, torch.matmul(left, right), alpha=scale)


def grouped_product(multiply: Grouped, x: Tensor, value: LowRank, offs: Tensor) -> Tensor:
    """Return the product of groups of rows, each with a matrix of its own.

    `multiply` is called as `F.grouped_mm` is: x `(rows, m)`, sorted by group, a stack `(groups, m,
    n)`, and the end of each group. Rows behind the last are what it leaves there.
    """
    y = multiply(x, value.base, offs=offs)
    for left, right, scale in value.terms:
        # The kernels want rows of a multiple of 16 bytes, which a small rank is not.
        missing = -left.shape[-1] % max(1, 16 // y.element_size())
        h = multiply(x, F.pad(left, (0, missing)).to(x.dtype), offs=offs)
        update = multiply(h, F.pad(right, (0, 0, 0, missing)).to(h.dtype), offs=offs)
        y = torch.add(y, update, alpha=scale)
    return y
