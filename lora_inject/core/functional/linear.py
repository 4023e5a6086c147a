"""A frozen linear layer and its low-rank updates: `y = x W^T + b + sum of s (drop(x) A^T) B^T`.

1. Where anything watches (a compiler, a trace, a transform, a dispatch mode), or x is sparse, it is
   the formula in plain operations (`plain_operations`).
2. Else, with gradients, it is one autograd Function. It keeps x, which the frozen layers around it
   keep too, `h = x A^T`, which is thin, and which elements were dropped. It casts the thin factors
   and never x, unless the low-rank arithmetic is wider than x.
3. Without gradients it is the forward of that Function.

Every forward is the same sequence of operations, on every device and for every number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.core.functional.factors import (
    Spans,
    Update,
    as_matrix,
    cast,
    compute_dtype,
    no_view,
    without_autocast,
)
from lora_inject.core.functional.plain_operations import add_updates, differentiate
from lora_inject.core.functional.torch_inside import runs_plainly
from lora_inject.core.spec.sites import adapted_parts


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    updates: Sequence[Update],
    *,
    transposed: bool = False,
    float32: bool,
) -> Tensor:
    """Apply a frozen linear layer and its low-rank updates, as one step where nothing watches.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`, or `(in, out)` where `transposed`.
        bias: `(out,)` or None.
        updates: The updates to add.
        transposed: Whether the weight is stored (in, out), as GPT-2's Conv1D stores it.
        float32: Keep the low-rank arithmetic in float32 on a 16-bit base.

    Returns:
        `(..., out)`, in the dtype of the plain layer's output.

    Examples:
        >>> W, A, B = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
        >>> x = torch.randn(3, 4)
        >>> y = linear(x, W, None, [Update(A, B, 0.5)], float32=False)
        >>> torch.allclose(y, x @ (W + 0.5 * B @ A).T, atol=1e-5)
        True
    """
    if not runs_plainly() or x.layout is not torch.strided:
        y = frozen_output(x, weight, bias, transposed)
        return add_updates(y, x, updates, float32=float32)
    # Autocast changes only what is computed in another dtype than y's; to ask for it is slow.
    if not torch.is_grad_enabled() and (not float32 or without_autocast(x) is None):
        return _forward(x, weight, bias, updates, transposed=transposed, float32=float32)[0]
    off, low = without_autocast(x), None
    if off is not None and x.dtype != torch.float64:
        low = torch.get_autocast_dtype(x.device.type)
        x = x if float32 else x.to(low)  # by autograd: the layer and A share one copy
    how = _How(transposed, float32, low, [u[2:] for u in updates])
    factors = [t for u in updates for t in (u.A, u.B)]
    with off or nullcontext():
        output: Tensor = _Linear.apply(x, weight, bias, how, *factors)  # type: ignore[no-untyped-call]
    return output


def frozen_output(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Compute the frozen layer `(..., out)` as its own class does, bit for bit, in new memory."""
    return F.linear(x, weight.t() if transposed else weight, bias).contiguous()


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    updates: Sequence[Update],
    *,
    transposed: bool,
    float32: bool,
    low: torch.dtype | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the output, and the tensors of `_Kept` of each update; `low` is autocast's dtype.

    Few calls of Python, which are much of the time of one token.
    """
    if low is None:
        y = frozen_output(x, weight, bias, transposed)
    else:
        low_bias = None if bias is None else cast(bias, low)
        y = frozen_output(cast(x, low), cast(weight, low), low_bias, transposed)
    y2, x2 = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    dtype = compute_dtype(y.dtype, float32)
    x2 = cast(x2, dtype)
    kept: list[Tensor | None] = []
    for u in updates:
        A, B, scale, spans, dropout = u
        if not A.dtype == B.dtype == dtype:
            A, B = A.to(dtype), B.to(dtype)
        into, mask = torch.native_dropout(x2, dropout, True) if dropout else (x2, None)
        h = F.linear(into, A)
        if spans is None and y.dtype == dtype:
            y2.addmm_(h, B.t(), alpha=scale)
        else:
            for y_part, h_part, B_part in _parts(u, y2, h, B):
                _add_product(y_part, h_part, B_part.t(), scale)
        kept += (h, A, B, mask)
    return y, kept


class _Kept(NamedTuple):
    """What the backward of one update needs besides x."""

    h: Tensor  # `drop(x) A^T`, `(n, rank * parts)`
    A: Tensor  # both factors in the dtype of the product
    B: Tensor
    mask: Tensor | None  # the kept elements of x, bool `(n, in)`; None without dropout


def _parts(
    u: Update, wide: Tensor, thin: Tensor, B: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield matching views: of `(n, out)`, `(n, rank * parts)` and `(adapted out, rank)`."""
    if u.spans is None:
        yield wide, thin, B
    for part in adapted_parts(u.spans or (), B.shape[1]):
        yield wide[:, part.start : part.stop], thin[:, part.a], B[part.b]


# --------------------------------------------------------------------------------- the Function


class _How(NamedTuple):
    """What the Function needs besides tensors."""

    transposed: bool  # whether the weight is stored (in, out)
    float32: bool  # whether the low-rank arithmetic is in float32
    low: torch.dtype | None  # what autocast casts the layer to; None outside
    terms: Sequence[tuple[float, Spans | None, float]]  # scale, spans and dropout of each update

    def updates(self, factors: Sequence[Tensor]) -> list[Update]:
        each = zip(factors[::2], factors[1::2], self.terms, strict=True)
        return [Update(A, B, *term) for A, B, term in each]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: _How, *factors: Tensor
    ) -> Tensor:
        transposed, float32, low, _ = how
        updates = how.updates(factors)
        y, kept = _forward(
            x, weight, bias, updates, transposed=transposed, float32=float32, low=low
        )
        ctx.how = how
        ctx.save_for_backward(x, weight, bias, *factors, *kept)
        # On a CPU `F.linear` of a batch is a view of a matrix. Autograd forbids to change a view
        # that a Function returns, and models do change a layer's output in place.
        return no_view(y, y.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(g) or nullcontext():
            return (_differentiated if torch.is_grad_enabled() else _gradients)(ctx, g)


def _saved(ctx: Any) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor], list[_Kept]]:
    """Return what a forward saved: x, weight, bias, the factors, and what each update kept."""
    x, weight, bias, *rest = ctx.saved_tensors
    n = 2 * len(ctx.how.terms)
    return x, weight, bias, rest[:n], [_Kept(*rest[i : i + 4]) for i in range(n, len(rest), 4)]


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients that are needed: of the frozen layer first, then of each update."""
    how, needs = ctx.how, ctx.needs_input_grad
    x, weight, bias, factors, kept = _saved(ctx)
    g2, x2, dtype = as_matrix(g), as_matrix(x), compute_dtype(g.dtype, how.float32)
    gx = gw = gb = None
    if needs[0]:
        gx = torch.mm(g2, cast(weight.t() if how.transposed else weight, g2.dtype))
        gx = cast(gx, dtype) if x.dtype == dtype else gx
    if needs[1]:
        low = cast(x2, g2.dtype)
        gw = cast(low.t() @ g2 if how.transposed else g2.t() @ low, weight.dtype)
    if bias is not None and needs[2]:
        gb = cast(g2.sum(0), bias.dtype)
    g2 = cast(g2, dtype)
    grads: list[Tensor | None] = []
    for i, (u, one) in enumerate(zip(how.updates(factors), kept, strict=True)):
        grads += _of_update(u, one, g2, x2, gx, needs[4 + 2 * i : 6 + 2 * i])
    return None if gx is None else cast(gx.view(x.shape), x.dtype), gw, gb, None, *grads


def _of_update(
    u: Update, kept: _Kept, g2: Tensor, x2: Tensor, gx: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of A and B as far as they are needed; add that of x to `gx` in place."""
    h, A, B, mask = kept
    # Made of g, and never by `out=`: g may be a batch of gradients (`is_grads_batched`).
    gh, gA, gB, scale = g2.new_empty(h.shape), None, None, u.scale / (1 - u.dropout)
    for g_part, gh_part, B_part in _parts(u, g2, gh, B):
        gh_part.addmm_(g_part, B_part, beta=0)
    if needs[0]:
        inputs = cast(x2, g2.dtype)
        gA = _scaled_product(gh.t(), inputs if mask is None else inputs * mask, scale)
    if needs[1]:
        gB = g2.new_empty(B.shape)
        for g_part, h_part, gB_part in _parts(u, g2, h, gB):
            gB_part.addmm_(g_part.t(), h_part, beta=0, alpha=u.scale)
    if gx is not None and mask is None:
        _add_product(gx, gh, A, scale)
    elif gx is not None and mask is not None:
        gx.addcmul_(torch.mm(gh, A), mask, value=scale)
    return None if gA is None else cast(gA, u.A.dtype), None if gB is None else cast(gB, u.B.dtype)


def _differentiated(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients with a graph, by the formula: this backward is itself differentiated."""
    how = ctx.how
    x, weight, bias, factors, kept = _saved(ctx)
    low_x, low_weight, low_bias = x, weight, bias
    if how.low is not None:
        low_x, low_weight = cast(x, how.low), cast(weight, how.low)
        low_bias = None if bias is None else cast(bias, how.low)
    y = frozen_output(low_x, low_weight, low_bias, how.transposed)
    masks = [None if one.mask is None else one.mask.view(x.shape) for one in kept]
    y = add_updates(y, x, how.updates(factors), float32=how.float32, masks=masks)
    inputs = (x, weight, bias, None, *factors)
    return differentiate(y, inputs, ctx.needs_input_grad, g)


def _add_product(y: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return `y += scale * left @ right`, rounded once to the dtype of y."""
    if y.dtype != left.dtype:
        return y.add_(left @ right, alpha=scale)
    return y.addmm_(left, right, alpha=scale)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return `scale * left @ right` in one operation."""
    unread = left.new_empty(1, 1)  # as beta is 0
    return torch.addmm(unread, left, right, beta=0, alpha=scale)
