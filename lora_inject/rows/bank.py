"""The bank: adapters that are stacked, of which each row of a batch takes its own.

Updates are gathered by row, so the cost does not grow with the number of adapters (Punica,
arXiv:2310.18547, has the same idea as a GPU kernel). A row uses the factors of its own adapter
only, so NaN in another adapter does not reach it. Nothing is kept from one forward to the next,
because fused optimizers write tensors without a change of their versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lora_inject.core.functional.factors import Update, cast, compute_dtype, without_autocast
from lora_inject.core.functional.plain_operations import spread
from lora_inject.core.functional.torch_inside import runs_plainly


def routed_update(
    y: Tensor,
    x: Tensor,
    places: Tensor,
    adapters: Sequence[Sequence[Update]],
    *,
    float32: bool,
    in_order: bool = False,
) -> Tensor:
    """Add to each row of a batch the update of its own adapter.

    Args:
        y: `(batch, ..., out)`.
        x: `(batch, ..., in)`.
        places: `(batch,)`, int64: 0 for the base, else 1 + the index of the row's adapter. Fewer
            stand for as many equal runs of rows.
        adapters: The updates of each adapter, of any ranks.
        float32: Keep the arithmetic in float32 over a 16-bit base.
        in_order: Whether the places are 1, 2, ... to the number of adapters: none is gathered.

    Returns:
        `(batch, ..., out)`, in the dtype of `y`. Rows of the base keep their bits.

    Examples:
        >>> A, B = torch.randn(2, 4), torch.randn(6, 2)
        >>> y, x = torch.zeros(2, 1, 6), torch.randn(2, 1, 4)
        >>> adapters = [[Update(A, B, 0.5)]]
        >>> routed = routed_update(y, x, torch.tensor([1, 0]), adapters, float32=False)
        >>> torch.allclose(routed[0], 0.5 * x[0] @ A.T @ B.T, atol=1e-6), bool(routed[1].any())
        (True, False)
    """
    with without_autocast(y) or nullcontext():
        dtype = compute_dtype(y.dtype, float32)
        A, B_T, scale = stacked(adapters, y.shape[-1], dtype, base=not in_order)
        if not in_order:
            A, B_T = A.index_select(0, places), B_T.index_select(0, places)
        x3 = x.reshape(places.shape[0], -1, x.shape[-1])
        y3 = cast(y.reshape(places.shape[0], -1, y.shape[-1]), dtype)
        x3 = _routed_dropout(x3, places, [updates[0].dropout for updates in adapters])
        h = _thin(x3, A)
        return cast(torch.baddbmm(y3, h, B_T, alpha=scale), y.dtype).view(y.shape)


def _thin(x3: Tensor, A: Tensor) -> Tensor:
    """Return `x A^T` in the dtype of A; backward keeps a narrower x as it is, and no wide copy."""
    if x3.dtype == A.dtype or not runs_plainly() or not torch.is_grad_enabled():
        return torch.bmm(x3.to(A.dtype), A.mT)
    output: Tensor = _Widened.apply(x3, A)  # type: ignore[no-untyped-call]
    return output


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x3: Tensor, A: Tensor) -> Tensor:
        ctx.save_for_backward(x3, A)
        return torch.bmm(x3.to(A.dtype), A.mT)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x3, A = ctx.saved_tensors
        of_x, of_A = ctx.needs_input_grad
        return (
            torch.bmm(g, A).to(x3.dtype) if of_x else None,
            torch.bmm(g.mT, x3.to(A.dtype)) if of_A else None,
        )


def _routed_dropout(x3: Tensor, places: Tensor, dropouts: Sequence[float]) -> Tensor:
    """Drop elements of each row with its adapter's probability."""
    if not any(dropouts):
        return x3
    # Filled on the device: a tensor of Python numbers would be copied there in each forward.
    p = torch.stack([x3.new_full((), p) for p in (0.0, *dropouts)]).index_select(0, places)
    p = p.view(-1, 1, 1)
    return x3 * (torch.rand_like(x3) >= p) / (1 - p)


def stacked(
    adapters: Sequence[Sequence[Update]],
    out: int,
    dtype: torch.dtype,
    *,
    base: bool = False,
) -> tuple[Tensor, Tensor, float]:
    """Stack adapters as A and B^T, `(n, R, in)` and `(n, R, out)`, and return their scale.

    Spans are included, and smaller ranks are padded with zeros; with `base` zeros come before the
    first, for no adapter. With the rank as rows both lie as products of batches want them: over
    a float32 base a token of 16 rows took 12 times as long with a stack of B, on one CPU.
    """
    As, Bs, scales = map(list, zip(*(_one_pair(us, out, dtype) for us in adapters), strict=True))
    scale = scales[0]
    if any(other != scale for other in scales):
        Bs, scale = [B * own for B, own in zip(Bs, scales, strict=True)], 1.0
    rank = max(A.size(0) for A in As)
    # Cast as a stack: that is one launch for any number of adapters.
    A = _stacked(As, rank, base=base).to(dtype)
    return A, _stacked([B.t() for B in Bs], rank, base=base).to(dtype), scale


def _stacked(factors: Sequence[Tensor], rank: int, *, base: bool) -> Tensor:
    """Stack factors `(r, width)` with zeros behind each, up to a rank, and first for the base."""
    zeros = factors[0].new_zeros(rank, factors[0].size(1))
    pieces = [zeros] if base else []
    for factor in factors:
        pieces += [factor, zeros[len(factor) :]] if len(factor) < rank else [factor]
    return torch.cat(pieces).view(-1, *zeros.shape)


def _one_pair(
    updates: Sequence[Update], out: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float]:
    """Return `A (R, in)`, `B (out, R)` and a scale, as one plain pair that equals all updates."""
    if len(updates) == 1 and updates[0].spans is None:
        u = updates[0]
        return u.A, u.B, u.scale
    As = [u.A.to(dtype) for u in updates]
    Bs = [spread(u.B.to(dtype) * u.scale, u.spans, out) for u in updates]
    return torch.cat(As), torch.cat(Bs, dim=1), 1.0
