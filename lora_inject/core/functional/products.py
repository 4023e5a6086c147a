"""Products of thin factors, scaled and added in as few operations as the dtypes allow."""

from __future__ import annotations

import torch
from torch import Tensor


def as_matrix(t: Tensor) -> Tensor:
    """Return a tensor `(..., width)` as `(n, width)`, a view where it can be one."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def add_product(y: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return `y += scale * left @ right`, of matrices or stacks, rounded once to the dtype of y."""
    if y.dtype != left.dtype:
        return y.add_(left @ right, alpha=scale)
    return (y.addmm_ if y.dim() == 2 else y.baddbmm_)(left, right, alpha=scale)


def scaled_product(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """Return `scale * left @ right`, of matrices or stacks, in one operation."""
    multiply = torch.addmm if left.dim() == 2 else torch.baddbmm
    unread = left.new_empty(()).expand(*[1] * left.dim())  # as beta is 0
    return multiply(unread, left, right, beta=0, alpha=scale, out=out)
