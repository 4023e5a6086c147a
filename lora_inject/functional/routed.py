"""One adapter for each row of a batch, in two batched products.

Factors are gathered by row, so the cost does not grow with the number of adapters
(Punica, arXiv:2310.18547, has the same idea as a GPU kernel). In training each adapter's gradient
is the sum over its own rows. Without gradients there is more to choose from: `routed_inference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.functional.factors import Factors, needs_plain_operations, spread
from lora_inject.functional.linear import differentiate_again


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
        A_bank, B_bank = bank(adapters, y.shape[-1], _dtype(y, float32), base=True)
        x3 = x.reshape(x.shape[0], -1, x.shape[-1])
        x3 = _routed_dropout(x3, rows, [updates[0].dropout for updates in adapters])
        y3 = y.reshape(y.shape[0], -1, y.shape[-1])
        if needs_plain_operations() or not torch.is_grad_enabled():
            return _routed(y3, x3, rows, A_bank, B_bank)[0].view(y.shape)
        out: Tensor = _RoutedFunction.apply(y3, x3, rows, A_bank, B_bank)  # type: ignore[no-untyped-call]
        return out.view(y.shape)


def bank(
    adapters: Sequence[Sequence[Factors]], out: int, dtype: torch.dtype, *, base: bool = False
) -> tuple[Tensor, Tensor]:
    """Stack adapters, each as one plain pair that equals all its updates, scale and spans included.

    Args:
        adapters: The updates of each of `n` adapters.
        out: Width of the output.
        dtype: What to stack in.
        base: Put zeros before the first, which stand for no adapter.

    Returns:
        A `(n, R, in)` and B `(n, out, R)`; smaller ranks are padded with zeros.
    """
    pairs = [(A, B * scale) for A, B, scale in (one_pair(u, out, dtype) for u in adapters)]
    rank = max(A.shape[0] for A, _ in pairs)
    if base:
        A, B = pairs[0]
        pairs.insert(0, (A.new_zeros(rank, A.shape[1]), B.new_zeros(out, rank)))
    As, Bs = zip(*(padded(A, B, rank) for A, B in pairs), strict=True)
    return torch.stack(As), torch.stack(Bs)


def _dtype(y: Tensor, float32: bool) -> torch.dtype:
    return torch.float32 if float32 and y.dtype != torch.float64 else y.dtype


def _routed(
    y3: Tensor, x3: Tensor, rows: Tensor, A_bank: Tensor, B_bank: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the routed output `(batch, n, out)`, and `h = A x^T`, `(batch, R, n)`.

    As in `linear`, thin products have the rank as rows: `x A^T` takes up to twice as long.
    """
    h = torch.bmm(A_bank.index_select(0, rows), x3.to(A_bank.dtype).transpose(1, 2))
    right = B_bank.index_select(0, rows).transpose(1, 2)
    return added(y3, h.transpose(1, 2), right), h


def added(y3: Tensor, h: Tensor, right: Tensor, in_place: bool = False) -> Tensor:
    """Return `y3 + h @ right`, batch by batch, in the dtype of `y3`.

    Args:
        y3: `(batch, n, out)`.
        h: `(batch, n, R)`.
        right: `(batch, R, out)`.
        in_place: Whether y3 may be modified.
    """
    if y3.dtype == h.dtype:
        return y3.baddbmm_(h, right) if in_place else torch.baddbmm(y3, h, right)
    return torch.baddbmm(y3.to(h.dtype), h, right).to(y3.dtype)


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
        gh = torch.bmm(B_bank.index_select(0, rows).transpose(1, 2), gw.transpose(1, 2))
        gx = gA = gB = None
        if needs[1]:
            gx = torch.bmm(gh.transpose(1, 2), A_bank.index_select(0, rows)).to(x3.dtype)
        if needs[3]:
            gA = torch.zeros_like(A_bank).index_add_(0, rows, torch.bmm(gh, x3.to(gh.dtype)))
        if needs[4]:
            each = torch.bmm(h, gw).transpose(1, 2)
            gB = torch.zeros_like(B_bank).index_add_(0, rows, each)
        return g, gx, None, gA, gB


def padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return a pair that is filled up with zeros to a rank."""
    missing = rank - A.shape[0]
    return (F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))) if missing else (A, B)


def one_pair(
    updates: Sequence[Factors], out: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float]:
    """Return `A (R, in)`, `B (out, R)` and a scale, as one plain pair that equals all updates."""
    if len(updates) == 1 and updates[0].spans is None:
        u = updates[0]
        return u.A.to(dtype), u.B.to(dtype), u.scale
    As = [u.A.to(dtype) for u in updates]
    Bs = [u.B.to(dtype) * u.scale for u in updates]
    wide = [
        B if u.spans is None else spread(B, u.spans, out) for B, u in zip(Bs, updates, strict=True)
    ]
    return torch.cat(As), torch.cat(wide, dim=1), 1.0


def _routed_dropout(x3: Tensor, rows: Tensor, dropouts: Sequence[float]) -> Tensor:
    """Drop elements of each row with the probability of its adapter."""
    if not any(dropouts):
        return x3
    p = torch.tensor((0.0, *dropouts), device=x3.device, dtype=x3.dtype)[rows].view(-1, 1, 1)
    keep = torch.rand_like(x3) >= p
    return x3 * keep / (1 - p)
