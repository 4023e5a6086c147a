"""Updates in operations that all of torch can look into: the formula, as it stands in the paper.

Compilers, traces and function transforms, dispatch modes, nested tensors and DTensors get it, and
layers that run by themselves (quantized or unknown ones), and a backward that is itself
differentiated. It writes to no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.core.functional.factors import (
    Spans,
    Update,
    as_matrix,
    cast,
    cast_stack,
    compute_dtype,
    no_view,
    without_autocast,
)
from lora_inject.core.spec.sites import adapted_parts


def add_updates(
    y: Tensor,
    x: Tensor,
    updates: Sequence[Update],
    *,
    float32: bool,
    masks: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Return `y + sum of scale * drop(x) A^T B^T` for the output y of a layer called with x.

    Args:
        y: `(..., out)`.
        x: `(..., in)`.
        updates: The updates.
        float32: Keep the low-rank arithmetic in float32 on a 16-bit base.
        masks: For each update the kept elements of x, bool; None to drop anew.
    """
    out, x = y, cast(x, compute_dtype(y.dtype, float32))
    with without_autocast(y) or nullcontext():
        for u, mask in zip(updates, masks or [None] * len(updates), strict=True):
            kept = x
            if u.dropout:
                kept = _dropped(x, u.dropout) if mask is None else x * mask / (1 - u.dropout)
            B = spread(u.B, u.spans, y.size(-1))
            out = add_thin(out, kept, u.A.t(), B.t(), u.scale, float32=float32)
    return out


def embedding(
    base: Tensor,
    ids: Tensor,
    updates: Sequence[Update],
    padding_idx: int | None,
    *,
    float32: bool,
) -> Tensor:
    """Add low-rank updates to looked-up rows: `base + scale * A[:, ids]^T B^T`, out of place.

    `base` is `(..., dim)` of the frozen table for ids `(...)`; A is `(rank, num)`, B `(dim, rank)`.
    Dropout drops whole tokens, because the input of A is a one-hot vector. The row `padding_idx`
    receives no gradient, as in `nn.Embedding`.
    """
    out = base.reshape(-1, base.shape[-1])
    with without_autocast(base) or nullcontext():
        for u in updates:
            h = F.embedding(ids.reshape(-1), u.A.t())
            if u.dropout:
                h = h * F.dropout(h.new_ones(len(h), 1), u.dropout)
            out = _add_product(out, h, u.B.t(), u.scale, float32=float32)
    if padding_idx is not None:
        # Padding tokens get the updates but no gradient, as in the dense table.
        out = torch.where((ids.reshape(-1, 1) == padding_idx), out.detach(), out)
    # Not a view, like a plain embedding's output: wrappers that shard warn of views. The memory is
    # not shared.
    return no_view(out, base.shape)


def _dropped(x: Tensor, p: float) -> Tensor:
    """Drop elements in one operation; `F.dropout` is several, which write in place."""
    if x.is_nested or x.layout is not torch.strided:  # torch drops no element of a sparse one
        return F.dropout(x if x.is_nested else x.to_dense(), p)
    return torch.native_dropout(x, p, True)[0]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right`; nested and sparse tensors are multiplied by `F.linear` alone."""
    return F.linear(left, right.t()) if right.dim() == 2 else torch.matmul(left, right)


def add_thin(
    y: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    scale: float,
    *,
    float32: bool,
    multiply: Callable[[Tensor, Tensor], Tensor] = _product,
    in_front: bool = False,
) -> Tensor:
    """Return `y + scale * x @ left @ right`: the thin product, of a matrix or of stacks of them.

    Args:
        y: `(..., out)`.
        x: `(..., in)`; the only tensor that is never cast, unless the arithmetic is wider than it.
        left: `(..., in, rank)`.
        right: `(..., rank, out)`.
        scale: Factor on the product.
        float32: Keep the arithmetic in float32 where y has 16 bits.
        multiply: How two tensors are multiplied.
        in_front: Whether the factors stand before x: `y + scale * left @ right @ x`.

    Returns:
        A new tensor, in the dtype of y.

    Examples:
        >>> y, x, left, right = (torch.randn(n, m) for n, m in [(3, 6), (3, 4), (4, 2), (2, 6)])
        >>> total = add_thin(y, x, left, right, 0.5, float32=False)
        >>> torch.allclose(total, y + 0.5 * x @ (left @ right), atol=1e-5)
        True
    """
    dtype = compute_dtype(y.dtype, float32)
    x, left, right = cast(x, dtype), cast_stack(left, dtype), cast_stack(right, dtype)
    if in_front:
        right = multiply(right, x)
    else:
        left = multiply(x, left)
    return _add_product(y, left, right, scale, float32=float32, multiply=multiply)


def _add_product(
    y: Tensor,
    left: Tensor,
    right: Tensor,
    scale: float,
    *,
    float32: bool,
    multiply: Callable[[Tensor, Tensor], Tensor] = _product,
) -> Tensor:
    """Return `y + scale * left @ right` in y's dtype, in one operation where torch has one."""
    dtype = compute_dtype(y.dtype, float32)
    left, right = cast(left, dtype), cast(right, dtype)
    if y.is_nested:  # torch has few operations for these
        return y + scale * multiply(left, right).to(y.dtype)
    one = multiply is _product and dtype == y.dtype
    if one and right.dim() == 2:
        total = torch.addmm(as_matrix(y), as_matrix(left), right, alpha=scale)
        return total if y.dim() == 2 else total.reshape(y.shape)
    if one and y.dim() == left.dim() == right.dim() == 3 and len(left) == len(right):
        return torch.baddbmm(y, left, right, alpha=scale)
    return cast(torch.add(y, multiply(left, right), alpha=scale), y.dtype)


def spread(B: Tensor, spans: Spans | None, out: int) -> Tensor:
    """Spread a stacked B over all outputs: `(..., adapted, rank)` to `(..., out, rank * parts)`."""
    if spans is None:
        return B
    rank = B.shape[-1]
    width, end, pieces = rank * len(spans), 0, []
    for start, stop, ranks, rows in adapted_parts(spans, rank):
        pieces.append(B.new_zeros(*B.shape[:-2], start - end, width))
        # Whole, it is no alias: torch 2.9 shards none.
        piece = B.narrow(-2, rows.start, stop - start)
        pieces.append(F.pad(piece, (ranks.start, width - ranks.stop)))
        end = stop
    pieces.append(B.new_zeros(*B.shape[:-2], out - end, width))
    return torch.cat(pieces, dim=-2)


def differentiate(
    out: Tensor,
    inputs: Sequence[Tensor | None],
    needs: Iterable[bool],
    g: Tensor,
    *,
    again: bool = True,
) -> tuple[Tensor | None, ...]:
    """Differentiate plain operations, for a backward that may itself be differentiated `again`.

    `out` is their value, `g` its gradient; each input that needs one gets a gradient.
    """
    wanted = [need and t is not None for t, need in zip(inputs, needs, strict=True)]
    tensors = [t for t, want in zip(inputs, wanted, strict=True) if want and t is not None]
    gradients = iter(torch.autograd.grad(out, tensors, g, create_graph=again))
    return tuple(next(gradients) if want else None for want in wanted)
