"""Updates in operations that tracers and function transforms can look into, transform and fuse.

They write to no tensor. Nested tensors have these only, and a backward that is itself
differentiated runs through them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.core.functional.factors import Spans, Update, cast, compute_dtype
from lora_inject.core.functional.products import as_matrix
from lora_inject.core.spec.sites import adapted_parts


def plus_product(y2: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return `y2 + scale * left @ right`, differentiably, in the dtype of `y2`."""
    if left.dtype == y2.dtype:
        return torch.addmm(y2, left, right, alpha=scale)
    return torch.add(y2, left @ right, alpha=scale).to(y2.dtype)


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


def plain_updates(
    y: Tensor,
    x: Tensor,
    updates: Sequence[Update],
    masks: Sequence[Tensor | None],
    float32: bool,
) -> Tensor:
    """Add updates to y by the formula; `masks` are kept elements of x, None to drop anew."""
    x2, out = cast(as_matrix(x), compute_dtype(y.dtype, float32)), as_matrix(y)
    for u, mask in zip(updates, masks, strict=True):
        kept = x2
        if u.dropout:
            kept = F.dropout(x2, u.dropout) if mask is None else x2 * mask / (1 - u.dropout)
        h, B = kept @ cast(u.A, x2.dtype).t(), spread(cast(u.B, x2.dtype), u.spans, out.shape[1])
        out = plus_product(out, h, B.t(), u.scale)
    return out.reshape(y.shape)


def add_to_nested(y: Tensor, x: Tensor, updates: Iterable[Update]) -> Tensor:
    """Add updates to a nested tensor, in the few operations that torch has for these."""
    for u in updates:
        B, h = spread(u.B, u.spans, y.size(-1)), F.dropout(x, u.dropout) if u.dropout else x
        y = y + F.linear(F.linear(h, u.A.to(y.dtype)), B.to(y.dtype)) * u.scale
    return y


def differentiate(
    out: Tensor,
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    g: Tensor,
    *,
    again: bool = True,
) -> tuple[Tensor | None, ...]:
    """Differentiate plain operations, for a backward that may itself be differentiated `again`.

    `out` is their value, `g` its gradient; each input that needs one gets a gradient.
    """
    wanted = [t for t, need in zip(inputs, needs, strict=True) if t is not None and need]
    gradients = iter(torch.autograd.grad(out, wanted, g, create_graph=again))
    return tuple(
        next(gradients) if t is not None and need else None
        for t, need in zip(inputs, needs, strict=True)
    )


def add_anew(
    y2: Tensor, updates: Sequence[Update], thin: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Add updates, of which `x A^T` and B are known, with a new tensor for each sum."""
    for u, (h, B) in zip(updates, thin, strict=True):
        y2 = plus_product(y2, h, spread(B, u.spans, y2.shape[1]).t(), u.scale)
    return y2
