"""Products of thin factors, scaled and added in as few operations as the dtypes allow."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_inject.core.functional import cpu
from lora_inject.core.functional.wide_products import plus_wide_product


def as_matrix(t: Tensor) -> Tensor:
    """Return a tensor `(..., width)` as `(n, width)`, a view where it can be one."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def add_product(
    y: Tensor, left: Tensor, right: Tensor, scale: float, *, in_place: bool = True
) -> Tensor:
    """Return `y + scale * left @ right`, of matrices or stacks, rounded once to the dtype of y.

    Autograd cannot differentiate it where the dtypes differ.
    """
    if y.dtype != left.dtype:
        if cpu.is_cpu(y) and y.dtype.itemsize < left.dtype.itemsize:
            return plus_wide_product(y, left, right, scale, in_place=in_place)
        out = y if in_place else torch.empty_like(y, memory_format=torch.contiguous_format)
        return torch.add(y, torch.matmul(left, right), alpha=scale, out=out)
    if not in_place or hasattr(y, "full_tensor"):  # before torch 2.11 a DTensor has no addmm_
        return torch.addmm(y, left, right, alpha=scale)
    return (y.addmm_ if y.dim() == 2 else y.baddbmm_)(left, right, alpha=scale)


def scaled_product(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """Return `scale * left @ right`, of matrices or stacks, in one operation."""
    multiply = torch.addmm if left.dim() == 2 else torch.baddbmm
    unread = left.new_empty(()).expand(*[1] * left.dim())  # as beta is 0
    return multiply(unread, left, right, beta=0, alpha=scale, out=out)
