"""One adapter for each row of a batch, in two batched products.

Factors are gathered by row, so the cost does not grow with the number of adapters (Punica,
arXiv:2310.18547, has the same idea as a GPU kernel), and a row meets the factors of its own adapter
only: what is broken in another one does not reach it. Nothing is kept from one forward to the next:
no version counter tells of what fused optimizers write.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.functional import cpu
from lora_inject.functional.factors import (
    Factors,
    cast,
    compute_dtype,
    needs_plain_operations,
    spread,
    without_autocast,
)
from lora_inject.functional.linear import differentiate


def routed_update(
    y: Tensor,
    x: Tensor,
    places: Tensor,
    adapters: Sequence[Sequence[Factors]],
    *,
    float32: bool,
    in_place: bool = False,
) -> Tensor:
    """Add to each row of a batch the update of its own adapter.

    Unequal ranks are padded with zeros.

    Args:
        y: `(batch, ..., out)`.
        x: `(batch, ..., in)`.
        places: `(batch,)`, int64: 0 for the base, else 1 + the index of the row's adapter. Fewer
            stand for as many equal runs of rows.
        adapters: The updates of each adapter.
        float32: Keep the arithmetic in float32 over a 16-bit base.
        in_place: Whether y may be modified where no gradient is needed: nobody else has it.

    Returns:
        `(batch, ..., out)`, in the dtype of `y`. Rows of the base keep their bits.

    Examples:
        >>> A, B = torch.randn(2, 4), torch.randn(6, 2)
        >>> y, x = torch.zeros(2, 1, 6), torch.randn(2, 1, 4)
        >>> adapters = [[Factors(A, B, 0.5)]]
        >>> found = routed_update(y, x, torch.tensor([1, 0]), adapters, float32=False)
        >>> torch.allclose(found[0], 0.5 * x[0] @ A.T @ B.T, atol=1e-6), bool(found[1].any())
        (True, False)
    """
    with without_autocast(y) or nullcontext():
        dtype = compute_dtype(y.dtype, float32)
        A_bank, B_bank = bank(adapters, y.shape[-1], dtype, base=True)
        x3 = x.reshape(places.shape[0], -1, x.shape[-1])
        y3 = y.reshape(places.shape[0], -1, y.shape[-1])
        x3 = _routed_dropout(x3, places, [updates[0].dropout for updates in adapters])
        plain = needs_plain_operations()
        if plain or not torch.is_grad_enabled():
            return _routed(y3, x3, places, A_bank, B_bank, in_place and not plain)[0].view(y.shape)
        out: Tensor = _RoutedFunction.apply(y3, x3, places, A_bank, B_bank)  # type: ignore[no-untyped-call]
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
    pairs = [_one_pair(updates, out, dtype) for updates in adapters]
    rank = max(A.shape[0] for A, _, _ in pairs)
    even = len({scale for _, _, scale in pairs}) == 1
    scale = pairs[0][2] if even else 1.0
    padded = [_padded(A, B if even else B * own, rank) for A, B, own in pairs]
    if base:
        A, B = padded[0]
        padded.insert(0, (torch.zeros_like(A), torch.zeros_like(B)))
    As, Bs = zip(*padded, strict=True)
    B = torch.stack(Bs)
    return torch.stack(As), B if scale == 1.0 else B * scale


def _routed(
    y3: Tensor, x3: Tensor, places: Tensor, A_bank: Tensor, B_bank: Tensor, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the routed output `(batch, n, out)`, and `h = A x^T`, `(batch, R, n)`.

    Thin products have the rank as rows: on a CPU `x A^T` takes up to twice as long.
    """
    h = torch.bmm(A_bank.index_select(0, places), x3.to(A_bank.dtype).mT)
    right = B_bank.index_select(0, places).mT
    if y3.dtype != h.dtype:
        return torch.baddbmm(y3.to(h.dtype), h.mT, right).to(y3.dtype), h
    return (y3.baddbmm_(h.mT, right) if in_place else torch.baddbmm(y3, h.mT, right)), h


class _RoutedFunction(torch.autograd.Function):
    """Saves x, h and the banks; the factors of each row are gathered again."""

    @staticmethod
    def forward(
        ctx: Any, y3: Tensor, x3: Tensor, places: Tensor, A_bank: Tensor, B_bank: Tensor
    ) -> Tensor:
        out, h = _routed(y3, x3, places, A_bank, B_bank)
        ctx.save_for_backward(x3, places, A_bank, B_bank, h)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x3, places, A_bank, B_bank, h = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            out, _ = _routed(g.new_zeros(g.shape), x3, places, A_bank, B_bank)
            return (g, *differentiate(out, (x3, None, A_bank, B_bank), needs[1:], g))
        gw = g.to(h.dtype)
        gh = torch.bmm(B_bank.index_select(0, places).mT, gw.mT)
        gx = gA = gB = None
        if needs[1]:
            gx = torch.bmm(gh.mT, A_bank.index_select(0, places)).to(x3.dtype)
        if needs[3]:
            each = torch.bmm(gh, x3.to(gh.dtype))
            gA = torch.zeros_like(A_bank).index_add_(0, places, each)
        if needs[4]:
            each = torch.bmm(h, gw).mT
            gB = torch.zeros_like(B_bank).index_add_(0, places, each)
        return g, gx, None, gA, gB


def _padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return a pair that is filled up with zeros to a rank."""
    missing = rank - A.shape[0]
    return (F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))) if missing else (A, B)


def _one_pair(
    updates: Sequence[Factors], out: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float]:
    """Return `A (R, in)`, `B (out, R)` and a scale, as one plain pair that equals all updates."""
    if len(updates) == 1 and updates[0].spans is None:
        u = updates[0]
        return cast(u.A, dtype), cast(u.B, dtype), u.scale
    As = [u.A.to(dtype) for u in updates]
    Bs = [u.B.to(dtype) * u.scale for u in updates]
    wide = [
        B if u.spans is None else spread(B, u.spans, out) for B, u in zip(Bs, updates, strict=True)
    ]
    return torch.cat(As), torch.cat(wide, dim=1), 1.0


def dropped(x: Tensor, u: Factors) -> Tensor:
    """Return `(..., in)` with the same elements dropped as for the adapter alone."""
    return cpu.drop(x.reshape(-1, x.shape[-1]), u.dropout)[0].view(x.shape)


def _routed_dropout(x3: Tensor, places: Tensor, dropouts: Sequence[float]) -> Tensor:
    """Drop elements of each row with the probability of its adapter."""
    if not any(dropouts):
        return x3
    # Filled on the device: a tensor of Python numbers would be copied there in each forward.
    p = torch.stack([x3.new_full((), p) for p in (0.0, *dropouts)]).index_select(0, places)
    p = p.view(-1, 1, 1)
    return x3 * (torch.rand_like(x3) >= p) / (1 - p)
