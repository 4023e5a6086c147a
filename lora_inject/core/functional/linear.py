"""A frozen linear layer and its low-rank updates: `y = x W^T + b + sum of s (drop(x) A^T) B^T`.

1. Where anything watches (a compiler, a trace, a transform, a dispatch mode), or x is sparse, it is
   the formula in plain operations (`plain_operations`).
2. Else, with gradients, it is one autograd Function. It keeps x, `h = x A^T`, which is thin, and
   which elements were dropped; of an update that takes no gradient, as the frozen layer, none of
   them but the last. It casts the thin factors and never x, unless the low-rank arithmetic is wider
   than x.
3. Without gradients it is the forward of that Function.
4. Where outputs have gains, 2 and 3 multiply by W + delta itself (`gained_linear`).

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
from lora_inject.core.functional.gain import Gains, gained
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
    formed: Formed | None = None,
) -> Tensor:
    """Apply a frozen linear layer and its low-rank updates, as one step where nothing watches.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`, or `(in, out)` where `transposed`.
        bias: `(out,)` or None.
        updates: The updates to add.
        transposed: Whether the weight is stored (in, out), as GPT-2's Conv1D stores it.
        float32: Keep the low-rank arithmetic in float32 on a 16-bit base.
        formed: What x is multiplied by in the one step; see `gained_linear`.

    Returns:
        `(..., out)`, in the dtype of the plain layer's output.

    Examples:
        >>> W, A, B = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
        >>> x = torch.randn(3, 4)
        >>> y = linear(x, W, None, [Update(A, B, 0.5)], float32=False)
        >>> torch.allclose(y, x @ (W + 0.5 * B @ A).T, atol=1e-5)
        True
    """
    plainly = runs_plainly() and x.layout is torch.strided
    # Autocast changes only what is computed in another dtype than y's; to ask for it is slow.
    if plainly and not torch.is_grad_enabled() and (not float32 or without_autocast(x) is None):
        return _forward(x, weight, bias, updates, transposed=transposed, float32=float32)[0]
    off, low = without_autocast(x), None
    if off is not None and x.dtype != torch.float64:
        low = torch.get_autocast_dtype(x.device.type)
        x = x if float32 else x.to(low)  # by autograd: the layer and A share one copy
    if not plainly:
        y = frozen_output(x, weight, bias, transposed)
        return add_updates(y, x, updates, float32=float32)
    how = _How(transposed, float32, low, [u[2:] for u in updates])
    factors = [t for u in updates for t in (u.A, u.B)]
    with off or nullcontext():
        output: Tensor = _Linear.apply(x, weight, bias, how, formed, *factors)  # type: ignore[no-untyped-call]
    return output


class Formed(NamedTuple):
    """W + delta, which x is multiplied by where outputs have gains, as `gain.Sum` has it."""

    total: Tensor
    left: Tensor
    right: Tensor
    within: Tensor | None  # the gains that were multiplied into the total


def gained_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    updates: Sequence[Update],
    gains: Gains,
    *,
    transposed: bool,
    float32: bool,
) -> Tensor:
    """Apply a frozen linear layer with updates whose outputs have gains: `x (g (W + delta))^T + b`.

    An update may leave little of an output's weight. `W x` in 16 bits, rounded before the update is
    added and its gain multiplied, is then noise. So x is multiplied by W + delta, which `gains` has
    formed; the gradients are those of the thin products. Where anything watches a forward with
    gradients, and over packed weights, it is the formula `g y + (1 - g) b` with that noise.

    Where a bias follows, and where a gain may be more than 16 bits hold, a gain above 1 is in the
    weight: `g y` would multiply the rounding of the bias as well.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`, or `(in, out)` where `transposed`.
        bias: `(out,)` or None.
        updates: The updates, without dropout.
        gains: Their gains, and W + delta.
        transposed: Whether the weight is stored (in, out).
        float32: Keep the low-rank arithmetic in float32 on a 16-bit base.

    Returns:
        `(..., out)`, in the dtype of the plain layer's output, whose bits it has where gains are 1
        and updates are 0.
    """
    gain, summed = gains
    strided = x.layout is torch.strided
    if torch.is_grad_enabled() and not (strided and runs_plainly()):
        y = linear(x, weight, bias, updates, transposed=transposed, float32=float32)
        return gained(y, gain, bias)
    within = None
    if bias is not None or summed.total.dtype == torch.float16:
        within = gain.detach().clamp(min=1)
        of_weight = cast(within if transposed else within[:, None], summed.total.dtype)
        summed = summed._replace(total=summed.total * of_weight)
        gain = gain / within
    if torch.is_grad_enabled():
        formed, how = Formed(*summed, within), {"transposed": transposed, "float32": float32}
        y = linear(x, weight, bias, updates, formed=formed, **how)
    else:
        y = frozen_output(x, summed.total, bias, transposed)
    return gained(y, gain, bias)


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
    total: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the output, and the tensors of `_Kept` of each update.

    `low` is autocast's dtype. With `total`, W + delta, x is multiplied by that.
    Few calls of Python, which are much of the time of one token.
    """
    matrix = weight if total is None else total
    if low is None:
        y = frozen_output(x, matrix, bias, transposed)
    else:
        low_bias = None if bias is None else cast(bias, low)
        y = frozen_output(cast(x, low), cast(matrix, low), low_bias, transposed)
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
        if total is not None:
            pass
        elif spans is None and y.dtype == dtype:
            y2.addmm_(h, B.t(), alpha=scale)
        else:
            for y_part, h_part, B_part in _parts(u, y2, h, B):
                _add_product(y_part, h_part, B_part.t(), scale)
        kept += (h, A, B, mask)
    return y, kept


class _Kept(NamedTuple):
    """What the backward of one update needs besides x."""

    h: Tensor | None  # `drop(x) A^T`, `(n, rank * parts)`; None where B takes no gradient
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
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        how: _How,
        formed: Formed | None,
        *factors: Tensor,
    ) -> Tensor:
        transposed, float32, low, _ = how
        updates = how.updates(factors)
        total, *of_sum = formed or (None,) * 4  # the total is not kept
        y, kept = _forward(
            x, weight, bias, updates, transposed=transposed, float32=float32, low=low, total=total
        )
        ctx.how, ctx.x_shape, ctx.x_dtype = how, x.shape, x.dtype
        of_weight, of_factors = ctx.needs_input_grad[1], ctx.needs_input_grad[5:]
        kept_x = x if of_weight or any(of_factors) else None
        for i, of_B in enumerate(of_factors[1::2]):
            kept[4 * i] = kept[4 * i] if of_B else None
        ctx.save_for_backward(kept_x, weight, bias, *of_sum, *factors, *kept)
        # On a CPU `F.linear` of a batch is a view of a matrix. Autograd forbids to change a view
        # that a Function returns, and models do change a layer's output in place.
        return no_view(y, y.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(g) or nullcontext():
            return (_differentiated if torch.is_grad_enabled() else _gradients)(ctx, g)


def _saved(
    ctx: Any,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor | None], list[Tensor], list[_Kept]]:
    """Return x, weight, bias, all but the total of `Formed`, factors, and what each update kept."""
    x, weight, bias, left, right, within, *rest = ctx.saved_tensors
    if x is None:  # no gradient depends on its values
        x = weight.new_empty((), dtype=ctx.x_dtype).expand(ctx.x_shape)
        x = x.requires_grad_(ctx.needs_input_grad[0])
    n = 2 * len(ctx.how.terms)
    kept = [_Kept(*rest[i : i + 4]) for i in range(n, len(rest), 4)]
    return x, weight, bias, [left, right, within], rest[:n], kept


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients that are needed: of the frozen layer first, then of each update."""
    how, needs = ctx.how, ctx.needs_input_grad
    x, weight, bias, (left, right, within), factors, kept = _saved(ctx)
    g2, x2, dtype = as_matrix(g), as_matrix(x), compute_dtype(g.dtype, how.float32)
    gx = gw = gb = added = None
    if bias is not None and needs[2]:
        gb = cast(g2.sum(0), bias.dtype)
    if within is not None:
        g2 = g2 * cast(within, g2.dtype)
    if needs[0]:
        total = weight if left is None or right is None else torch.addmm(weight, left, right)
        gx = torch.mm(g2, cast(total.t() if how.transposed else total, g2.dtype))
        gx = cast(gx, dtype) if x.dtype == dtype else gx
        added = gx if left is None else None  # else the sum has the updates
    if needs[1]:
        low = cast(x2, g2.dtype)
        gw = cast(low.t() @ g2 if how.transposed else g2.t() @ low, weight.dtype)
    g2 = cast(g2, dtype)
    grads: list[Tensor | None] = []
    for i, (u, one) in enumerate(zip(how.updates(factors), kept, strict=True)):
        grads += _of_update(u, one, g2, x2, added, needs[5 + 2 * i : 7 + 2 * i])
    gx = None if gx is None else cast(gx.view(x.shape), x.dtype)
    return gx, gw, gb, None, None, *grads


def _of_update(
    u: Update, kept: _Kept, g2: Tensor, x2: Tensor, gx: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of A and B as far as they are needed; add that of x to `gx` in place."""
    h, A, B, mask = kept
    # Made of g, and never by `out=`: g may be a batch of gradients (`is_grads_batched`).
    gh, gA, gB = g2.new_empty(len(x2), len(A)), None, None
    scale = u.scale / (1 - u.dropout)
    for g_part, gh_part, B_part in _parts(u, g2, gh, B):
        gh_part.addmm_(g_part, B_part, beta=0)
    if needs[0]:
        inputs = cast(x2, g2.dtype)
        gA = _scaled_product(gh.t(), inputs if mask is None else inputs * mask, scale)
    if h is not None:
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
    x, weight, bias, (_, _, within), factors, kept = _saved(ctx)
    low_x, low_weight, low_bias = x, weight, bias
    if how.low is not None:
        low_x, low_weight = cast(x, how.low), cast(weight, how.low)
        low_bias = None if bias is None else cast(bias, how.low)
    y = frozen_output(low_x, low_weight, low_bias, how.transposed)
    masks = [None if one.mask is None else one.mask.view(x.shape) for one in kept]
    y = add_updates(y, x, how.updates(factors), float32=how.float32, masks=masks)
    if within is not None:
        y = gained(y, within, bias)
    inputs = (x, weight, bias, None, None, *factors)
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
