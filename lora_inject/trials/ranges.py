"""A frozen linear layer whose tokens have adapters by ranges, for many runs that train at once.

Adapters of one shape, with equally many tokens each, are one stacked product over views of the
memory that holds them. The backward adds to gradients where they are kept. So nothing is gathered,
stacked or copied, and the number of operations does not grow with the number of adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_inject.core.functional import torch_inside
from lora_inject.core.functional.factors import (
    Spans,
    cast,
    compute_dtype,
    no_view,
    without_autocast,
)
from lora_inject.core.functional.linear import frozen_output
from lora_inject.core.functional.plain_operations import plus_product, spread
from lora_inject.core.functional.products import add_product, as_matrix
from lora_inject.core.spec.sites import adapted_parts
from lora_inject.trials.torch_engine import will_run


class TokenRange(NamedTuple):
    """Adapters of consecutive tokens, all with equally many.

    Attributes:
        tokens: The first token and the one after the last.
        A: `(n, rank * parts, in)`.
        B: `(n, adapted out, rank)`.
        scale: Factor on `B @ A`.
        spans: `(start, stop)` along the output of each part; None for the whole output.
        grads: Where the backward adds the gradients of A and B; None for a frozen pair.
    """

    tokens: tuple[int, int]
    A: Tensor
    B: Tensor
    scale: float
    spans: Spans | None = None
    grads: tuple[Tensor, Tensor] | None = None

    def part(self, i: int) -> TokenRange:
        """Return the i-th adapter alone."""
        A, B = self.A[i : i + 1], self.B[i : i + 1]
        if self.grads is None:
            return self._replace(A=A, B=B)
        gA, gB = self.grads
        return self._replace(A=A, B=B, grads=(gA[i : i + 1], gB[i : i + 1]))

    def of(self, t: Tensor) -> Tensor:
        """Return the tokens of each adapter as a view `(n, tokens each, width)` of a matrix."""
        start, stop = self.tokens
        mine = t if stop - start == t.shape[0] else t[start:stop]
        return mine.view(self.A.shape[0], -1, t.shape[1])

    def parts(self, wide: Tensor, thin: Tensor, B: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield matching views of outputs, of `A x^T` and of B, or of their gradients."""
        if self.spans is None:
            yield wide, thin, B
            return
        for part in adapted_parts(self.spans, B.shape[2]):
            yield wide[..., part.start : part.stop], thin[:, part.a], B[:, part.b]


def ranged_linear(
    x: Tensor,
    kept: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ranges: Sequence[TokenRange],
    anchor: Tensor,
    reached: Callable[[], Any],
    *,
    transposed: bool = False,
    float32: bool = False,
) -> Tensor:
    """Apply a frozen linear layer with the updates of ranges of its tokens.

    Args:
        x: `(..., in)`.
        kept: x after dropout, or x itself.
        weight: `(out, in)`, or `(in, out)` where `transposed`.
        bias: `(out,)` or None.
        ranges: Factors in the dtype of their arithmetic.
        anchor: A leaf that requires a gradient and gets none: the backward runs for it, and adds to
            the gradients of the ranges.
        reached: Called where the backward has added to these gradients.
        transposed: Whether the weight is stored as transformers' Conv1D stores it.
        float32: Keep the low-rank arithmetic in float32 over a 16-bit base.

    Returns:
        `(..., out)`, in the dtype of the plain layer's output.
    """
    dtype, context = None, without_autocast(x)
    if context is not None:
        dtype, same = torch.get_autocast_dtype(x.device.type), kept is x
        if not float32:
            x = lowered(x, dtype)
            kept = x if same else lowered(kept, dtype)
    how = (ranges, reached, transposed, float32, dtype)
    with context or nullcontext():
        output: Tensor = _Ranged.apply(x, kept, weight, bias, anchor, how)  # type: ignore[no-untyped-call]
        return output


def lowered(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor as autocast gives it to a matrix product."""
    return t if t.dtype in (dtype, torch.float64) else t.to(dtype)


def _frozen_gradient(
    ctx: Any, g2: Tensor, weight: Tensor, low: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """Return the frozen layer's gradient of x, in the dtype of the arithmetic if x has that."""
    gx = torch.mm(g2, cast(weight.t() if ctx.transposed else weight, g2.dtype))
    return cast(gx, low) if dtype == low else gx


def _gradient_of_thin(one: TokenRange, g3: Tensor, h: Tensor) -> Tensor:
    """Return the gradient of h `(n, rank * parts, tokens each)`, before the scale."""
    gh = torch.empty_like(h)
    for g_part, gh_part, B_part in one.parts(g3, gh, one.B):
        torch.bmm(B_part.mT, g_part.mT, out=gh_part)
    return gh


def _add_gradients(one: TokenRange, g3: Tensor, x3: Tensor, h: Tensor, gh: Tensor) -> None:
    """Add the gradients of A and B of a range in place; nothing for a frozen pair."""
    if one.grads is None:
        return
    # Not by baddbmm_: on a CPU it multiplies matrices apart that do not touch.
    one.grads[0].add_(torch.bmm(gh, x3), alpha=one.scale)
    for g_part, h_part, gB_part in one.parts(g3, h, one.grads[1]):
        gB_part.add_(torch.bmm(g_part.mT, h_part.mT), alpha=one.scale)


def _viewed(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.view(like.shape)


def _plus_range(y2: Tensor, one: TokenRange, h: Tensor) -> Tensor:
    """Return y `(tokens, out)` plus the update of a range, of h `(n, rank * parts, tokens each)`.

    Out of place, as a mode may keep y.
    """
    B = spread(one.B, one.spans, y2.shape[1])
    mine = [
        plus_product(y_part, h_part.t(), B_part.t(), one.scale)
        for y_part, h_part, B_part in zip(one.of(y2), h, B, strict=True)
    ]
    start, stop = one.tokens
    return torch.slice_scatter(y2, torch.cat(mine), 0, start, stop)


class _Ranged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        _anchor: Tensor,
        how: tuple[Sequence[TokenRange], Callable[[], Any], bool, bool, torch.dtype | None],
    ) -> Tensor:
        ranges, ctx.reached, transposed, ctx.float32, dtype = how
        low_weight, low_bias = weight, bias
        if dtype is not None:
            x, low_weight = lowered(x, dtype), lowered(weight, dtype)
            low_bias = None if bias is None else lowered(bias, dtype)
        out = frozen_output(x, low_weight, low_bias, transposed)
        low = compute_dtype(out.dtype, ctx.float32)
        x2, y2, thin = cast(as_matrix(kept), low), as_matrix(out), []
        recorded = torch_inside.is_recorded()
        for one in ranges:
            # The rank as rows: on a CPU `x A^T` takes up to twice as long.
            h = torch.bmm(one.A, one.of(x2).mT)
            if recorded:
                y2 = _plus_range(y2, one, h)
            else:
                for y_part, h_part, B_part in one.parts(one.of(y2), h, one.B):
                    add_product(y_part, h_part.mT, B_part.mT, one.scale)
            thin.append(h)
        out = y2.view(out.shape)
        ctx.ranges, ctx.transposed, ctx.apart = ranges, transposed, kept is not x
        ctx.save_for_backward(kept, weight, *thin)
        return no_view(out, out.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, *thin = ctx.saved_tensors
        of_x, of_kept, *_ = ctx.needs_input_grad
        g2, x2, into = as_matrix(g), as_matrix(kept), None
        low = compute_dtype(g.dtype, ctx.float32)
        gx = _frozen_gradient(ctx, g2, weight, low, x2.dtype) if of_x else None
        if of_kept:
            into = torch.zeros_like(x2) if ctx.apart else gx
        g2, x2 = cast(g2, low), cast(x2, low)
        # A derivative with respect to other tensors must leave these gradients as they are.
        trains = will_run(ctx.next_functions[-1][0])  # of the anchor
        if trains:
            ctx.reached()
        for one, h in zip(ctx.ranges, thin, strict=True):
            gh = _gradient_of_thin(one, one.of(g2), h)
            if trains:
                _add_gradients(one, one.of(g2), one.of(x2), h, gh)
            if into is not None:
                add_product(one.of(into), gh.mT, one.A, one.scale)
        g_kept = into if ctx.apart else None
        return _viewed(gx, kept), _viewed(g_kept, kept), None, None, None, None
