"""Low-rank updates of looked-up rows, and the norm that an embedding may enforce on them.

The input of an embedding is a one-hot vector, so `x A^T` is a lookup in A.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.functional.factors import (
    Factors,
    compute_dtype,
    needs_plain_operations,
    plus_product,
    without_autocast,
)


def embedding(
    base: Tensor,
    ids: Tensor,
    updates: Sequence[Factors],
    padding_idx: int | None,
    *,
    float32: bool = False,
) -> Tensor:
    """Add low-rank updates to looked-up rows: `base + scale * A[:, ids]^T B^T`.

    Args:
        base: `(..., dim)`, the rows of the frozen table; never modified.
        ids: `(...)`, integer.
        updates: A `(rank, num)`, B `(dim, rank)`. Dropout drops whole tokens: the input of A is a
            one-hot vector.
        padding_idx: The row that receives no gradient, as in `nn.Embedding`.
        float32: Keep the low-rank arithmetic in float32 over a 16-bit base.

    Returns:
        `(..., dim)`, in the dtype of `base`.
    """
    dtype = compute_dtype(base.dtype, float32)
    out = base.reshape(-1, base.shape[-1])
    with without_autocast(base) or nullcontext():
        for u in updates:
            h = F.embedding(ids.reshape(-1), u.A.t())
            if u.dropout:
                h = h * F.dropout(h.new_ones(len(h), 1), u.dropout)
            out = plus_product(out, h.to(dtype), u.B.to(dtype).t(), u.scale)
    if padding_idx is not None:
        # Padding tokens see the updates but teach them nothing, as in the dense table.
        out = torch.where((ids.reshape(-1, 1) == padding_idx), out.detach(), out)
    return out.view(base.shape)


def renormalized(rows: Tensor, max_norm: float, p: float) -> Tensor:
    """Scale rows down to a norm, as `nn.Embedding(max_norm=...)` does to its table, differentiably.

    Args:
        rows: `(..., dim)`; never modified.
        max_norm: The largest norm that a row may have.
        p: Which norm.

    Returns:
        `(..., dim)`: bit for bit what `torch.embedding_renorm_` would leave in those rows.
    """
    if needs_plain_operations():
        return _scaled_down(rows, max_norm, p)
    return _Renormalized.apply(rows, max_norm, p)  # type: ignore[no-untyped-call,no-any-return]


def _scaled_down(rows: Tensor, max_norm: float, p: float) -> Tensor:
    norm = torch.linalg.vector_norm(rows, p, dim=-1, keepdim=True)
    return torch.where(norm > max_norm, rows * (max_norm / (norm + 1e-7)), rows)


class _Renormalized(torch.autograd.Function):
    """torch's own renormalization forward, the derivative of its formula backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, max_norm: float, p: float) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.how = (max_norm, p)
        out = rows.reshape(-1, rows.shape[-1]).clone()
        torch.embedding_renorm_(out, torch.arange(len(out), device=out.device), max_norm, p)
        return torch.ops.aten._unsafe_view.default(out, rows.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = rows if twice else rows.detach().requires_grad_()
            out = _scaled_down(leaf, *ctx.how)
        (grad,) = torch.autograd.grad(out, leaf, g, create_graph=twice)
        return grad, None, None


def routed_embedding(
    base: Tensor,
    ids: Tensor,
    rows: Tensor,
    adapters: Sequence[Sequence[Factors]],
    padding_idx: int | None,
    *,
    float32: bool = False,
) -> Tensor:
    """Add to each row of a batch of looked-up rows the update of its own adapter.

    Args:
        base: `(batch, ..., dim)`; never modified.
        ids: `(batch, ...)`, integer.
        rows: `(batch,)`, int64: 0 for the base, else 1 + the index of the row's adapter.
        adapters: The updates of each adapter.
        padding_idx: As in `embedding`.
        float32: As in `embedding`.

    Returns:
        `(batch, ..., dim)`, in the dtype of `base`.
    """
    out = base
    for index, updates in enumerate(adapters):
        # A look at which rows these are would wait for the device, and a tracer cannot tell.
        mine = (rows == index + 1).view(-1, *[1] * ids.dim())
        changed = embedding(base, ids, updates, padding_idx, float32=float32)
        out = torch.where(mine, changed, out)
    return out
