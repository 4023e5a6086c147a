"""A frozen linear layer and its low-rank updates, forward and backward.

With gradients, layer and updates are one autograd Function. It keeps x, which the frozen layers
around it keep too, and `h = x A^T`, which is thin. It casts the thin factors and never x, unless
the low-rank arithmetic is wider than x. It reads no value: every forward is the same sequence of
operations, on every device. Only few tokens on a CPU take fewer (`few_tokens`, `cpu.add_few_`).

Tracers and function transforms get other operations (`plain_operations`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, is_autocast_enabled, mv, strided
from torch.nn import Parameter

from lora_inject.core.functional import cpu, dropout, torch_inside
from lora_inject.core.functional.cpu import FEW
from lora_inject.core.functional.double_backward import differentiable_gradients
from lora_inject.core.functional.factors import (
    Update,
    cast,
    compute_dtype,
    needs_plain_operations,
    no_view,
    without_autocast,
)
from lora_inject.core.functional.plain_operations import add_anew, plain_updates
from lora_inject.core.functional.products import add_product, as_matrix, scaled_product
from lora_inject.core.functional.sliced import add_to_slices, gradients_of_slices
from lora_inject.core.functional.torch_inside import runs_plainly


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    updates: Sequence[Update],
    *,
    transposed: bool = False,
    float32: bool = False,
) -> Tensor:
    """Apply a frozen linear layer and its low-rank updates, as one step where nothing traces it.

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
        >>> y = linear(x, W, None, [Update(A, B, 0.5)])
        >>> torch.allclose(y, x @ (W + 0.5 * B @ A).T, atol=1e-5)
        True
    """
    if needs_plain_operations():
        y = frozen_output(x, weight, bias, transposed, None)
        with without_autocast(y) or nullcontext():
            return plain_updates(y, x, updates, [None] * len(updates), float32)
    context = without_autocast(x)
    if context is None:
        alone = len(updates) == 1 and not torch.is_grad_enabled()
        if alone and cpu.are_few(x, updates[0]) and not torch_inside.is_recorded():
            y = frozen_output(x, weight, bias, transposed, None)  # the shortest path through Python
            cpu.add_few_(y, x, updates[0])
            return y
        return apply_updates(
            x, updates, weight=weight, bias=bias, transposed=transposed, float32=float32
        )
    dtype = torch.get_autocast_dtype(x.device.type)
    if not float32:  # by autograd, so that the layer and A share one copy, and x gets a gradient
        x = lowered(x, dtype)
    with context:
        return apply_updates(
            x,
            updates,
            weight=weight,
            bias=bias,
            transposed=transposed,
            float32=float32,
            dtype=dtype,
        )


def few_tokens(
    x: Tensor, weight: Any, bias: Tensor | None, A: Any, B: Any, scale: float
) -> Tensor | None:
    """Return what `linear` gives for one update of few tokens on a CPU; None for all else.

    There the time is in the number of steps, of Python as of torch: these are the fewest. What is
    asked is imported by its name: weights of width 768 push all else out of a core's cache, and
    then each attribute of a module takes a tenth of a microsecond. It is called without gradients.
    """
    if not runs_plainly() or is_autocast_enabled("cpu"):
        return None  # first: a trace would record what is asked of the sizes
    if not (type(weight) is type(A) is type(B) is Parameter and type(x) is Tensor):
        return None
    if x.is_nested or x.layout is not strided or not x.is_cpu:
        return None
    dtype = x.dtype
    if not (dtype is weight.dtype is A.dtype is B.dtype) or dtype not in _WIDE:
        return None
    n, width = x.numel(), x.size(-1)
    if not 0 < n <= FEW * width:
        return None
    y = F.linear(x, weight, bias)
    if n == width:
        y.view(-1).addmv_(B, mv(A, x.view(-1)), alpha=scale)
        return y
    y = y.contiguous()
    y.view(-1, y.shape[-1]).addmm_(torch.mm(x.reshape(-1, width), A.t()), B.t(), alpha=scale)
    return y


_WIDE = (torch.float32, torch.float64)


def apply_updates(
    x: Tensor,
    updates: Sequence[Update],
    *,
    y: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    transposed: bool = False,
    float32: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Add updates to y, or to the frozen layer of a weight, by the Function where it is needed.

    One of y and weight is given. `dtype` is what autocast casts the layer to, None outside.
    """
    if torch.is_grad_enabled():
        factors = [t for u in updates for t in (u.A, u.B)]
        if any(t is not None and t.requires_grad for t in (x, y, weight, bias, *factors)):
            how = _How(transposed, float32, dtype, [u[2:] for u in updates])
            output: Tensor = _Function.apply(x, y, weight, bias, how, *factors)  # type: ignore[no-untyped-call]
            return output
    if weight is not None:
        y = frozen_output(x, weight, bias, transposed, dtype)
    assert y is not None
    return _add(y, x, updates, float32, is_new=weight is not None)[0]


def lowered(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor as autocast gives it to a matrix product."""
    return t if t.dtype in (dtype, torch.float64) else t.to(dtype)


def frozen_output(
    x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, dtype: torch.dtype | None
) -> Tensor:
    """Compute the frozen layer exactly as its own class does, bit for bit.

    `dtype` is what autocast casts to, None outside.
    """
    if dtype is not None:
        x, weight = lowered(x, dtype), lowered(weight, dtype)
        bias = None if bias is None else lowered(bias, dtype)
    if not transposed:
        return F.linear(x, weight, bias).contiguous()
    # as the forward of GPT-2's Conv1D
    size_out = (*x.shape[:-1], weight.shape[1])
    if bias is None:
        return (x.reshape(-1, x.shape[-1]) @ weight).view(size_out)
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(size_out)


# --------------------------------------------------------------------------------- the Function


class Kept(NamedTuple):
    """What the backward of one update needs besides x."""

    h: Tensor  # `drop(x) A^T`, `(n, rank * parts)`
    A: Tensor  # both factors in the dtype of the product
    B: Tensor
    # None without dropout; else the kept elements of x, bool `(n, in)`, or on a CPU the gaps
    # between dropped elements, `(m,)`, integers
    dropped: Tensor | None


def _add(
    y: Tensor, x: Tensor, updates: Sequence[Update], float32: bool, *, is_new: bool
) -> tuple[Tensor, list[Kept]]:
    """Return the sum of y and all updates, and what their backward needs.

    `is_new` says that y was made by the caller.

    1. Where a mode may keep results, nothing is written to: each sum is a new tensor.
    2. Few tokens, and slices, are added in place. A y that is not new is copied first.
    3. Else the first sum is in place if y is new, and the others are.
    """
    y2, x2, dtype = as_matrix(y), as_matrix(x), compute_dtype(y.dtype, float32)
    if torch_inside.is_recorded():
        x2 = cast(x2, dtype)
        kept = [_thin(x2, u) for u in updates]
        return add_anew(y2, updates, [(one.h, one.B) for one in kept]).view(y.shape), kept
    is_ours = is_new
    kept = []
    for u in updates:
        few = y2.dtype == x2.dtype and cpu.are_few(x2, u)
        if not is_ours and (few or u.spans is not None):
            y2 = y2.clone(memory_format=torch.contiguous_format)
            is_ours = True
        if few:
            kept.append(Kept(cpu.add_few_(y2, x2, u), u.A, u.B, None))
        else:
            x2 = cast(x2, dtype)
            kept.append(_thin(x2, u))
            y2 = _plus(y2, u, kept[-1], in_place=is_ours)
        is_ours = True
    return y2.view(y.shape), kept


def _thin(x2: Tensor, u: Update) -> Kept:
    """Return `drop(x) A^T` in the dtype of x, with what else a backward needs."""
    A, B, dropped = cast(u.A, x2.dtype), cast(u.B, x2.dtype), None
    if u.dropout:
        x2, dropped = dropout.drop(x2, u.dropout)
    return Kept(torch.mm(x2, A.t()), A, B, dropped)


def _plus(y2: Tensor, u: Update, kept: Kept, *, in_place: bool) -> Tensor:
    """Return y with one update, whose `x A^T` is known; slices are always added in place."""
    if u.spans is None:
        return add_product(y2, kept.h, kept.B.t(), u.scale, in_place=in_place)
    add_to_slices(y2, u.spans, kept.h, kept.B, u.scale)
    return y2


class _How(NamedTuple):
    """What the Function needs besides tensors."""

    transposed: bool  # whether the layer is a Conv1D
    float32: bool  # whether the low-rank arithmetic is in float32
    dtype: torch.dtype | None  # what autocast casts to; None outside
    terms: Sequence[tuple[Any, ...]]  # scale, spans and dropout of each update

    def updates(self, factors: Sequence[Tensor]) -> list[Update]:
        pairs = zip(factors[::2], factors[1::2], strict=True)
        return [Update(*pair, *term) for pair, term in zip(pairs, self.terms, strict=True)]


class _Function(torch.autograd.Function):
    """Updates on a frozen layer, or on the output y of any layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        how: _How,
        *factors: Tensor,
    ) -> Tensor:
        is_new = weight is not None
        if weight is not None:
            y = frozen_output(x, weight, bias, how.transposed, how.dtype)
        assert y is not None
        out, kept = _add(y, x, how.updates(factors), how.float32, is_new=is_new)
        ctx.how = how
        ctx.save_for_backward(x, weight, bias, *factors, *(t for one in kept for t in one))
        # A batch comes as a view of a matrix, and autograd forbids to change a view that a
        # Function returns; models do change a layer's output in place.
        return no_view(out, out.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients, as far as they are needed; autocast has had its say in the forward.

        1. Where this backward is itself differentiated, by autograd through plain operations.
        2. Else those of the frozen layer first.
        3. To that of x each update adds its share, and A and B get theirs.
        """
        if (off := without_autocast(g)) is not None:
            with off:
                return _Function.backward(ctx, g)
        how, needs = ctx.how, ctx.needs_input_grad
        x, weight, bias, factors, kept = _saved(ctx)
        if torch.is_grad_enabled():
            y = torch.zeros_like(g)
            if weight is not None:
                y = frozen_output(x, weight, bias, how.transposed, how.dtype)
            updates, dropped = how.updates(factors), [one.dropped for one in kept]
            inputs = (x, None, weight, bias, None, *factors)
            return differentiable_gradients(y, inputs, updates, dropped, how.float32, needs, g)
        g2, x2, dtype = as_matrix(g), as_matrix(x), compute_dtype(g.dtype, how.float32)
        gx2, gw, gb = _of_frozen(g2, x2, weight, bias, how.transposed, needs)
        if gx2 is not None and x.dtype == dtype:
            gx2 = cast(gx2, dtype)
        g2 = cast(g2, dtype)
        grads: list[Tensor | None] = []
        for i, (u, one) in enumerate(zip(how.updates(factors), kept, strict=True)):
            wanted = (needs[0], *needs[5 + 2 * i : 7 + 2 * i])
            gx2, gA, gB = _backward_one(g2, x2, gx2, u, one, wanted)
            grads.append(None if gA is None else cast(gA, u.A.dtype))
            grads.append(None if gB is None else cast(gB, u.B.dtype))
        gx = None if gx2 is None else cast(gx2.view(x.shape), x.dtype)
        return (gx, g if needs[1] else None, gw, gb, None, *grads)


def _saved(ctx: Any) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor], list[Kept]]:
    """Return what a forward saved: x, weight, bias, the factors, and what each update kept."""
    x, weight, bias, *rest = ctx.saved_tensors
    n = 2 * len(ctx.how.terms)
    return x, weight, bias, rest[:n], [Kept(*rest[i : i + 4]) for i in range(n, len(rest), 4)]


def _of_frozen(
    g2: Tensor,
    x2: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    transposed: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of the frozen layer: of x `(n, in)`, of its weight and its bias."""
    gx2 = gw = gb = None
    if weight is not None and needs[0]:
        gx2 = torch.mm(g2, cast(weight.t() if transposed else weight, g2.dtype))
    if weight is not None and needs[2]:
        x2 = cast(x2, g2.dtype)
        gw = cast(x2.t() @ g2 if transposed else g2.t() @ x2, weight.dtype)
    if bias is not None and needs[3]:
        gb = cast(g2.sum(0), bias.dtype)
    return gx2, gw, gb


def _backward_one(
    g2: Tensor, x2: Tensor, gx2: Tensor | None, u: Update, kept: Kept, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x so far, of A and of B, as far as they are needed.

    `gx2` `(n, in)` may be overwritten; it is None if x has no gradient yet.
    """
    gA, scale = None, u.scale / (1 - u.dropout)
    if u.spans is None:  # without out=, which not every DTensor takes
        gh = torch.mm(g2, kept.B)
        gB = scaled_product(g2.t(), kept.h, u.scale) if needs[2] else None
    else:
        gh, gB = gradients_of_slices(g2, u.spans, kept.h, kept.B, u.scale, to_B=needs[2])
    if needs[1]:
        inputs = cast(x2, g2.dtype)
        if kept.dropped is not None:
            inputs = dropout.without(inputs, kept.dropped)
        gA = scaled_product(gh.t(), inputs, scale)
    if needs[0]:
        gx2 = _plus_share(gx2, gh, kept, scale)
    return gx2, gA, gB


def _plus_share(gx2: Tensor | None, gh: Tensor, kept: Kept, scale: float) -> Tensor:
    """Return `gx2 + scale * gh A` without dropped elements, in the memory of `gx2` if any."""
    if kept.dropped is None:
        if gx2 is None:
            return scaled_product(gh, kept.A, scale)
        return add_product(gx2, gh, kept.A, scale)
    return dropout.plus_share(gx2, gh, kept.A, scale, kept.dropped)  # type: ignore[no-any-return]
