"""One adapter for each row of a batch, in two batched products.

One idea: factors are gathered by row, so the cost does not grow with the number of adapters
(Punica, arXiv:2310.18547, has the same idea as a GPU kernel). In training each adapter's gradient
is the sum over its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.functional.factors import Factors, needs_plain_operations, spread
from lora_inject.functional.linear import differentiate_again

__all__ = ["routed_update"]


def routed_update(
    y: Tensor, x: Tensor, rows: Tensor, adapters: Sequence[Sequence[Factors]], *, float32: bool
) -> Tensor:
    """Add to each row of a batch the update of its own adapter.

    Two batched products over gathered factors: the cost does not grow with the number of adapters
    (Punica, arXiv:2310.18547, has the same idea as a GPU kernel). Unequal ranks are padded with
    zeros.

    Args:
        y: `(batch, ..., out)`; never modified.
        x: `(batch, ..., in)`.
        rows: `(batch,)`, int64: 0 for the base, else 1 + the index of the row's adapter.
        adapters: The updates of each adapter.
        float32: Keep the arithmetic in float32 over a 16-bit base.

    Returns:
        `(batch, ..., out)`, in the dtype of `y`.
    """
    with torch.autocast(y.device.type, enabled=False):
        dtype = torch.float32 if float32 and y.dtype != torch.float64 else y.dtype
        pairs = [_one_pair(updates, y.shape[-1], dtype) for updates in adapters]
        ranks = {A.shape[0] for A, _ in pairs}
        rank = max(ranks)
        base = (pairs[0][0].new_zeros(rank, x.shape[-1]), pairs[0][1].new_zeros(y.shape[-1], rank))
        if len(ranks) > 1:
            pairs = [(_padded(A, rank, 0), _padded(B, rank, 1)) for A, B in pairs]
        A_bank, B_bank = (torch.stack(bank) for bank in zip(base, *pairs, strict=True))
        x3 = x.reshape(x.shape[0], -1, x.shape[-1])
        x3 = _routed_dropout(x3, rows, [updates[0].dropout for updates in adapters])
        y3 = y.reshape(y.shape[0], -1, y.shape[-1])
        if needs_plain_operations() or not torch.is_grad_enabled():
            return _routed(y3, x3, rows, A_bank, B_bank)[0].view(y.shape)
        out: Tensor = _RoutedFunction.apply(y3, x3, rows, A_bank, B_bank)  # type: ignore[no-untyped-call]
        return out.view(y.shape)


def _routed(
    y3: Tensor, x3: Tensor, rows: Tensor, A_bank: Tensor, B_bank: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the routed output `(batch, n, out)` and `h = x A^T`, in the dtype of the banks."""
    left = A_bank.index_select(0, rows).transpose(1, 2)
    right = B_bank.index_select(0, rows).transpose(1, 2)
    h = torch.bmm(x3.to(left.dtype), left)
    if y3.dtype == h.dtype:
        return torch.baddbmm(y3, h, right), h
    return torch.baddbmm(y3.to(h.dtype), h, right).to(y3.dtype), h


class _RoutedFunction(torch.autograd.Function):
    """Saves x, h and the banks; the factors gathered for each row are gathered again."""

    @staticmethod
    def forward(
        ctx: Any, y3: Tensor, x3: Tensor, rows: Tensor, A_bank: Tensor, B_bank: Tensor
    ) -> Tensor:
        out, h = _routed(y3, x3, rows, A_bank, B_bank)
        ctx.save_for_backward(x3, rows, A_bank, B_bank, h)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x3, rows, A_bank, B_bank, h = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            out, _ = _routed(g.new_zeros(g.shape), x3, rows, A_bank, B_bank)
            return (g, *differentiate_again(out, (x3, None, A_bank, B_bank), needs[1:], g))
        gw = g.to(h.dtype)
        gh = torch.bmm(gw, B_bank.index_select(0, rows))
        gx = gA = gB = None
        if needs[1]:
            gx = torch.bmm(gh, A_bank.index_select(0, rows)).to(x3.dtype)
        if needs[3]:
            each = torch.bmm(gh.transpose(1, 2), x3.to(gh.dtype))
            gA = torch.zeros_like(A_bank).index_add_(0, rows, each)
        if needs[4]:
            each = torch.bmm(h.transpose(1, 2), gw).transpose(1, 2)
            gB = torch.zeros_like(B_bank).index_add_(0, rows, each)
        return g, gx, None, gA, gB


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    missing = rank - factor.shape[dim]
    return F.pad(factor, (0, 0, 0, missing) if dim == 0 else (0, missing))


def _one_pair(updates: Sequence[Factors], out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return one plain pair `(R, in)`, `(out, R)` that equals all updates, scale in B."""
    As, Bs = [], []
    for u in updates:
        As.append(u.A.to(dtype))
        B = u.B.to(dtype) * u.scale
        Bs.append(B if u.spans is None else spread(B, u.spans, out))
    return (As[0], Bs[0]) if len(As) == 1 else (torch.cat(As), torch.cat(Bs, dim=1))


def _routed_dropout(x3: Tensor, rows: Tensor, dropouts: Sequence[float]) -> Tensor:
    """Drop elements of each row with the probability of its adapter."""
    if not any(dropouts):
        return x3
    p = torch.tensor((0.0, *dropouts), device=x3.device, dtype=x3.dtype)[rows].view(-1, 1, 1)
    keep = torch.rand_like(x3) >= p
    return x3 * keep / (1 - p)
