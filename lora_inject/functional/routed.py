"""Adapters stacked in a bank; a tensor selects one for each row of a batch, or one mix.

Factors are gathered by row, so the cost does not grow with the number of adapters (Punica,
arXiv:2310.18547, has the same idea as a GPU kernel). A row uses the factors of its own adapter
only, so NaN in another adapter does not reach it. Nothing is kept from one forward to the next,
because fused optimizers write tensors without a change of their version counters.

In a compiled graph an adapter's name would be a constant. Numbers in an input tensor are only other
data for the same graph, and nothing is compiled again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.functional import cpu
from lora_inject.functional.factors import (
    Factors,
    compute_dtype,
    needs_plain_operations,
    spread,
    without_autocast,
)


def routed_update(
    y: Tensor,
    x: Tensor,
    places: Tensor,
    adapters: Sequence[Sequence[Factors]],
    *,
    float32: bool,
    in_place: bool = False,
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
        in_place: Whether y may be modified if no gradient is needed, because y is not shared.
        in_order: Whether the places are 1, 2, ... to the number of adapters: none is gathered.

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
        A, B = _bank(adapters, y.shape[-1], dtype, base=not in_order)
        if not in_order:
            A, B = A.index_select(0, places), B.index_select(0, places)
        x3 = x.reshape(places.shape[0], -1, x.shape[-1])
        y3 = y.reshape(places.shape[0], -1, y.shape[-1])
        x3 = _routed_dropout(x3, places, [updates[0].dropout for updates in adapters])
        # Thin products have the rank as rows: on a CPU `x A^T` takes up to twice as long.
        h = _thin(A, x3).mT
        if y3.dtype != dtype:
            out = torch.baddbmm(y3.to(dtype), h, B.mT).to(y3.dtype)
        elif in_place and not torch.is_grad_enabled() and not needs_plain_operations():
            out = y3.baddbmm_(h, B.mT)
        else:
            out = torch.baddbmm(y3, h, B.mT)
        return out.view(y.shape)


def _thin(A: Tensor, x3: Tensor) -> Tensor:
    """Return `A x^T` in the dtype of A; for the backward a narrower x is kept as it is."""
    if x3.dtype == A.dtype or needs_plain_operations() or not torch.is_grad_enabled():
        return torch.bmm(A, x3.to(A.dtype).mT)
    found: Tensor = _Widened.apply(A, x3)  # type: ignore[no-untyped-call]
    return found


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, x3: Tensor) -> Tensor:
        ctx.save_for_backward(A, x3)
        return torch.bmm(A, x3.to(A.dtype).mT)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        A, x3 = ctx.saved_tensors
        of_A, of_x = ctx.needs_input_grad
        return (
            torch.bmm(g, x3.to(A.dtype)) if of_A else None,
            torch.bmm(g.mT, A).to(x3.dtype) if of_x else None,
        )


def _routed_dropout(x3: Tensor, places: Tensor, dropouts: Sequence[float]) -> Tensor:
    """Drop elements of each row with its adapter's probability."""
    if not any(dropouts):
        return x3
    # Filled on the device: a tensor of Python numbers would be copied there in each forward.
    p = torch.stack([x3.new_full((), p) for p in (0.0, *dropouts)]).index_select(0, places)
    p = p.view(-1, 1, 1)
    return x3 * (torch.rand_like(x3) >= p) / (1 - p)


def dropped(x: Tensor, p: float) -> Tensor:
    """Return `(..., in)` with the same elements dropped as for the adapter alone."""
    return cpu.drop(x.reshape(-1, x.shape[-1]), p)[0].view(x.shape)


def routed_convolution(
    y: Tensor,
    x: Tensor,
    places: Tensor,
    adapters: Sequence[Sequence[Factors]],
    convolve: Callable[[Tensor, Tensor, int], Tensor],
    weight_shape: Sequence[int],
    *,
    float32: bool,
) -> Tensor:
    """Add to each row of a convolution's output the update of its own adapter, out of place.

    The update is a convolution with A, which has a few channels, and then a product with B. The
    rows are groups of one convolution, each with the A of its adapter: `convolve` is that of the
    layer without a bias, of an input, a weight and a number of groups; `weight_shape` is `(out,
    in / groups, *kernel)`. Rows of the base keep their bits.
    """
    with without_autocast(y) or nullcontext():
        dtype = compute_dtype(y.dtype, float32)
        A_bank, B_bank = _bank(adapters, weight_shape[0], dtype, base=True)
        batch, groups, rank = len(x), x.shape[1] // weight_shape[1], A_bank.shape[1]
        kernels = A_bank.index_select(0, places).view(batch, 1, rank, *weight_shape[1:])
        kernels = kernels.expand(-1, groups, *[-1] * (kernels.dim() - 2)).flatten(0, 2)
        h = convolve(x.to(dtype).flatten(0, 1)[None], kernels, batch * groups)
        B = B_bank.index_select(0, places).view(batch, groups, -1, rank)
        update = (B @ h.view(batch, groups, rank, -1)).view(y.shape)
        mine = (places > 0).view(-1, *[1] * (y.dim() - 1))
        return torch.where(mine, (y.to(dtype) + update).to(y.dtype), y)


def chosen_factors(
    choice: Tensor,
    numbers: Sequence[int],
    adapters: Sequence[Sequence[Factors]],
    out: int,
    dtype: torch.dtype,
) -> Factors:
    """Return one update that equals those of the adapters that a tensor names.

    `choice` is `(k, 2)`, float64: number and weight of each chosen adapter; `numbers` are those of
    this layer's adapters, which all have the same dropout. Adapters that are not chosen do not
    reach the output, not even where they hold NaN; where they require a gradient, it is zero.
    """
    A_bank, B_bank = _bank(adapters, out, dtype)
    rows = chosen_rows(choice[:, 0], numbers)
    index, here = (rows - 1).clamp(min=0), (rows > 0)[:, None, None]
    weights = choice[:, 1].to(dtype)[:, None, None]
    A = torch.where(here, A_bank.index_select(0, index), 0)
    B = torch.where(here, B_bank.index_select(0, index) * weights, 0)
    p = adapters[0][0].dropout
    return Factors(A.flatten(0, 1), B.transpose(0, 1).flatten(1), 1.0, dropout=p)


def chosen_rows(chosen: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return `(k,)`, int64: 1 + the place of each chosen number among `numbers`, 0 for strangers.

    Examples:
        >>> chosen_rows(torch.tensor([5.0, -1.0, 4.0]), [4, 5]).tolist()
        [2, 0, 1]
    """
    # Compared with numbers of Python: a tensor of them would be copied to the device each time.
    rows = torch.zeros_like(chosen, dtype=torch.int64)
    for place, number in enumerate(numbers, 1):
        rows = torch.where(chosen == number, place, rows)
    return rows


def _bank(
    adapters: Sequence[Sequence[Factors]],
    out: int,
    dtype: torch.dtype,
    *,
    base: bool = False,
) -> tuple[Tensor, Tensor]:
    """Stack adapters as A `(n, R, in)` and B `(n, out, R)`, scale and spans included.

    Smaller ranks are padded with zeros; with `base` zeros come before the first, for no adapter.
    """
    pairs = [_one_pair(updates, out, dtype) for updates in adapters]
    rank = max(A.shape[0] for A, _, _ in pairs)
    even = len({scale for _, _, scale in pairs}) == 1
    scale = pairs[0][2] if even else 1.0
    padded = [_padded(A, B if even else B * own, rank) for A, B, own in pairs]
    if base:
        A, B = padded[0]
        padded.insert(0, (torch.zeros_like(A), torch.zeros_like(B)))
    # Cast as a stack: that is one launch for any number of adapters.
    A, B = (torch.stack(factors).to(dtype) for factors in zip(*padded, strict=True))
    return A, B if scale == 1.0 else B * scale


def _padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - A.shape[0]
    return (F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))) if missing else (A, B)


def _one_pair(
    updates: Sequence[Factors], out: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float]:
    """Return `A (R, in)`, `B (out, R)` and a scale, as one plain pair that equals all updates."""
    if len(updates) == 1 and updates[0].spans is None:
        u = updates[0]
        return u.A, u.B, u.scale
    As = [u.A.to(dtype) for u in updates]
    Bs = [u.B.to(dtype) * u.scale for u in updates]
    wide = [
        B if u.spans is None else spread(B, u.spans, out) for B, u in zip(Bs, updates, strict=True)
    ]
    return torch.cat(As), torch.cat(wide, dim=1), 1.0
