"""The arithmetic: low-rank forward and backward, the effective weight, the dense delta, the fold.

One idea: the same fact, `W' = W + scale * B @ A`, is stated three times, each for one use.

* `linear` adds the update to a layer's output and never forms the delta (arXiv:2106.09685, eq. 3).
  With gradients it is one autograd Function that keeps x, which autograd shares with the frozen
  layer, and `h = x A^T`, which is thin; its skinny products are laid out for the BLAS. Without
  gradients it is two matrix products.
* `effective_weight` forms `W'` where a model reads the weight instead of calling the layer.
* `fold_rows` adds the delta to rows of W in float32 and rounds once, for merging.

`dense_delta` is the textbook formula, for analysis and for tests of the other three.

What is not here: modules. Everything takes and returns tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.sites import Block, SiteSpec

__all__ = [
    "Factors",
    "Tally",
    "Term",
    "dense_delta",
    "effective_weight",
    "embedding",
    "fold_rows",
    "fold_rows_",
    "linear",
    "master_dtype",
    "renormalised",
    "routed_embedding",
    "routed_update",
]

Spans = tuple[tuple[int, int], ...]


class Factors(NamedTuple):
    """One low-rank update as a forward uses it.

    Attributes:
        A: `(rank * parts, in)`.
        B: `(adapted out, rank)`.
        scale: Factor on `B @ A`, mixing weight included.
        spans: `(start, stop)` along the output of each part; None for the whole output.
        dropout: Probability of dropping an element of the input of A; 0 outside training.
    """

    A: Tensor
    B: Tensor
    scale: float
    spans: Spans | None = None
    dropout: float = 0.0


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that adapters over a base of `dtype` are kept in.

    float32 for every 16-bit, quantised or integer base, so that small optimiser steps are not
    rounded away; float64 stays float64.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------- forward


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    updates: Sequence[Factors],
    *,
    transposed: bool = False,
    float32: bool = False,
) -> Tensor:
    """Apply a frozen linear layer and its low-rank updates.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`, or `(in, out)` where `transposed`.
        bias: `(out,)` or None.
        updates: The updates to add.
        transposed: Whether the weight is stored as transformers' Conv1D stores it.
        float32: Keep the low-rank arithmetic in float32 over a 16-bit base.

    Returns:
        `(..., out)`, in the dtype of the plain layer's output.

    Example:
        >>> W, A, B = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
        >>> x = torch.randn(3, 4)
        >>> y = linear(x, W, None, [Factors(A, B, 0.5)])
        >>> torch.allclose(y, x @ (W + 0.5 * B @ A).T, atol=1e-5)
        True
    """
    if _needs_plain_operations():
        return add_updates(_base(x, weight, bias, transposed), x, updates, float32=float32)
    seeds = tuple(_seed(u.dropout) for u in updates)
    tensors = [t for u in updates for t in (u.A, u.B)]
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, *tensors)
    ):
        rest = tuple((u.scale, u.spans, u.dropout) for u in updates)
        how = _How(transposed, float32, rest, seeds)
        return _LinearFunction.apply(x, weight, bias, how, *tensors)  # type: ignore[no-untyped-call,no-any-return]
    y = _base(x, weight, bias, transposed)
    y2, x2 = y.view(-1, y.shape[-1]), _as_matrix(x, y.dtype, float32)
    for u, seed in zip(updates, seeds, strict=True):
        _add_stage(y2, _a_stage(x2, u, seed), u)
    return y


def add_updates(
    y: Tensor, x: Tensor, updates: Sequence[Factors], *, float32: bool = False
) -> Tensor:
    """Add low-rank updates to the output of a layer that was called untouched.

    The general path, for quantised and unknown bases: out of place, because such a base may need
    its output in its own backward, or hand out a view.

    Args:
        y: `(..., out)`, output of the layer; never modified.
        x: `(..., in)`, its input.
        updates: The updates to add.
        float32: Keep the low-rank arithmetic in float32 over a 16-bit base.

    Returns:
        `(..., out)`, in the dtype of `y`.
    """
    seeds = tuple(_seed(u.dropout) for u in updates)
    if _needs_plain_operations():
        return _plain_updates(y, x, updates, seeds, float32)
    tensors = [t for u in updates for t in (u.A, u.B)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, *tensors)):
        rest = tuple((u.scale, u.spans, u.dropout) for u in updates)
        how = _How(False, float32, rest, seeds)
        return _UpdateFunction.apply(y, x, how, *tensors)  # type: ignore[no-untyped-call,no-any-return]
    return _updated(y, x, updates, seeds, float32)[0]


def _plain_updates(
    y: Tensor, x: Tensor, updates: Iterable[Factors], seeds: Sequence[int | None], float32: bool
) -> Tensor:
    """The textbook formula in operations that autograd, torch.func and torch.compile know."""
    with torch.autocast(y.device.type, enabled=False):
        x2 = _as_matrix(x, y.dtype, float32)
        out = y.reshape(-1, y.shape[-1])
        for u, seed in zip(updates, seeds, strict=True):
            if seed is None:
                dropped = x2
            elif torch.compiler.is_compiling():
                dropped = F.dropout(x2, u.dropout)
            else:
                dropped = x2 * _mask(x2, u.dropout, seed)
            out = _plain_add(out, dropped @ u.A.to(x2.dtype).t(), u)
        return out.reshape(y.shape)


def _updated(
    y: Tensor, x: Tensor, updates: Iterable[Factors], seeds: Sequence[int | None], float32: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return y with the updates added, in memory of its own, and every `h`."""
    with torch.autocast(y.device.type, enabled=False):
        out = torch.empty_like(y, memory_format=torch.contiguous_format).copy_(y)
        y2, x2 = out.view(-1, y.shape[-1]), _as_matrix(x, y.dtype, float32)
        thin = []
        for u, seed in zip(updates, seeds, strict=True):
            h = _a_stage(x2, u, seed)
            _add_stage(y2, h, u)
            thin.append(h)
        return out, thin


def _plain_add(y2: Tensor, h: Tensor, u: Factors) -> Tensor:
    """Return `y2 + scale * h B^T` over the spans of `u`; y2 `(n, out)`, h `(n, rank * parts)`."""
    B = u.B.to(h.dtype)
    if u.spans is None:
        if h.dtype == y2.dtype:
            return torch.addmm(y2, h, B.t(), alpha=u.scale)
        return (y2 + u.scale * (h @ B.t())).to(y2.dtype)
    rank, pieces, end, row = B.shape[1], [], 0, 0
    for part, (start, stop) in enumerate(u.spans):
        pieces.append(y2[:, end:start])
        rows, cols = slice(row, row + stop - start), slice(part * rank, (part + 1) * rank)
        update = u.scale * (h[:, cols] @ B[rows].t())
        pieces.append((y2[:, start:stop] + update).to(y2.dtype))
        end, row = stop, rows.stop
    pieces.append(y2[:, end:])
    return torch.cat([p for p in pieces if p.shape[1]], dim=1)


def _needs_plain_operations() -> bool:
    """Whether a tracer or a function transform is watching, which a Function would hide from."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active()


def _base(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Compute the frozen layer exactly as its own class does, bit for bit."""
    if not transposed:
        return F.linear(x, weight, bias).contiguous()
    # transformers.pytorch_utils.Conv1D.forward
    size_out = (*x.shape[:-1], weight.shape[1])
    if bias is None:
        return (x.reshape(-1, x.shape[-1]) @ weight).view(size_out)
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(size_out)


def _as_matrix(x: Tensor, dtype: torch.dtype, float32: bool) -> Tensor:
    """View x as `(n, in)` in the dtype of the low-rank arithmetic; no copy where none is needed."""
    if float32 and dtype != torch.float64:
        dtype = torch.float32
    return x.reshape(-1, x.shape[-1]).to(dtype)


# Dropout keeps a seed, not a mask: the mask is drawn again in the backward. The seed comes from
# the global CPU generator, which checkpointing saves and restores, so a recomputed forward drops
# the same elements.


def _seed(p: float) -> int | None:
    """Draw a seed for a mask, or None where nothing is dropped."""
    return int(torch.randint(2**62, ()).item()) if p else None


def _mask(like: Tensor, p: float, seed: int) -> Tensor:
    """Return the `(n, in)` mask that `seed` stands for: 0, or 1 / (1 - p)."""
    generator = torch.Generator(like.device).manual_seed(seed)
    mask = torch.empty_like(like).bernoulli_(1 - p, generator=generator)
    return mask.mul_(1 / (1 - p))


def _a_stage(x2: Tensor, u: Factors, seed: int | None) -> Tensor:
    """Return `h = drop(x) A^T`, `(n, rank * parts)`, in the dtype of x2."""
    if seed is not None:
        x2 = _mask(x2, u.dropout, seed).mul_(x2)
    return F.linear(x2, u.A.to(x2.dtype))


def _add_stage(y2: Tensor, h: Tensor, u: Factors) -> None:
    """Add `scale * h B^T` to y2 in place, part by part."""
    B = u.B.to(h.dtype)
    if u.spans is None:
        _addmm_(y2, h, B.t(), u.scale)
        return
    rank, row = B.shape[1], 0
    for part, (start, stop) in enumerate(u.spans):
        rows = B[row : row + stop - start]
        _addmm_(y2[:, start:stop], h[:, part * rank : (part + 1) * rank], rows.t(), u.scale)
        row += stop - start


def _addmm_(y2: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """`y2 += scale * left @ right`, rounding once where y2 is narrower than the factors."""
    if y2.dtype == left.dtype:
        y2.addmm_(left, right, alpha=scale)
    else:
        y2.copy_(torch.addmm(y2.to(left.dtype), left, right, alpha=scale))


class _How(NamedTuple):
    """What `_LinearFunction` needs beside tensors."""

    transposed: bool
    float32: bool
    updates: tuple[tuple[float, Spans | None, float], ...]
    seeds: tuple[int | None, ...]


class _LinearFunction(torch.autograd.Function):
    """Frozen layer and updates in one node; saves x, h and the small factors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: _How, *tensors: Tensor
    ) -> Tensor:
        y = _base(x, weight, bias, how.transposed)
        with torch.autocast(y.device.type, enabled=False):
            y2, x2 = y.view(-1, y.shape[-1]), _as_matrix(x, y.dtype, how.float32)
            thin = []
            for u, seed in zip(_factors(how, tensors), how.seeds, strict=True):
                h = _a_stage(x2, u, seed)
                _add_stage(y2, h, u)
                thin.append(h)
        ctx.how = how
        ctx.save_for_backward(x, weight, bias, *tensors, *thin)
        # F.linear answers a batch with a view of a matrix, and autograd forbids to change a view
        # that a Function returns; models do change a layer's output in place.
        return torch.ops.aten._unsafe_view.default(y, y.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        how: _How = ctx.how
        n = 2 * len(how.updates)
        x, weight, bias, *rest = ctx.saved_tensors
        tensors, thin = rest[:n], rest[n:]
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            y = _base(x, weight, bias, how.transposed)
            out = _plain_updates(y, x, _factors(how, tensors), how.seeds, how.float32)
            return _again(out, (x, weight, bias, None, *tensors), needs, g)
        g2 = g.reshape(-1, g.shape[-1])
        x2 = _as_matrix(x, g.dtype, how.float32)
        gx2 = None
        if needs[0]:
            gx2 = g2 @ (weight.t() if how.transposed else weight).to(g.dtype)
        grads: list[Tensor | None] = []
        for i, u in enumerate(_factors(how, tensors)):
            wanted = (needs[4 + 2 * i], needs[5 + 2 * i])
            grads += _update_backward(g2, x2, thin[i], u, how.seeds[i], wanted, gx2)
        gx = gx2.view(x.shape).to(x.dtype) if gx2 is not None else None
        gw = _weight_gradient(g2, x2, how.transposed).to(weight.dtype) if needs[1] else None
        gb = g2.sum(0).to(bias.dtype) if bias is not None and needs[2] else None
        return (gx, gw, gb, None, *grads)


def _weight_gradient(g2: Tensor, x2: Tensor, transposed: bool) -> Tensor:
    return x2.t().to(g2.dtype) @ g2 if transposed else g2.t() @ x2.to(g2.dtype)


def _factors(how: _How, tensors: Sequence[Tensor]) -> Iterator[Factors]:
    for i, (scale, spans, dropout) in enumerate(how.updates):
        yield Factors(tensors[2 * i], tensors[2 * i + 1], scale, spans, dropout)


def _update_backward(
    g2: Tensor,
    x2: Tensor,
    h: Tensor,
    u: Factors,
    seed: int | None,
    wanted: tuple[bool, bool],
    gx2: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of A and B and add the update's part to gx2.

    Layout matters more than the count of products here: `(h^T g)^T` and a contiguous, small
    `s B^T` run three to four times faster on a CPU than `g^T h` and `g B`.
    """
    rank = u.B.shape[1]
    spans = u.spans or ((0, g2.shape[1]),)
    gA = gB = None
    gh = torch.empty_like(h)
    parts, row = [], 0
    for part, (start, stop) in enumerate(spans):
        cols = slice(part * rank, (part + 1) * rank)
        g_part = g2[:, start:stop].to(h.dtype)
        Bt = torch.mul(u.B[row : row + stop - start].t(), u.scale).to(h.dtype).contiguous()
        gh[:, cols] = F.linear(g_part, Bt)
        if wanted[1]:
            parts.append((h[:, cols].t() @ g_part).mul_(u.scale).t())
        row += stop - start
    if wanted[1]:
        gB = (torch.cat(parts) if len(parts) > 1 else parts[0]).to(u.B.dtype)
    mask = _mask(x2, u.dropout, seed) if seed is not None else None
    if wanted[0]:
        dropped = x2 if mask is None else mask * x2
        gA = (gh.t() @ dropped).to(u.A.dtype)
    if gx2 is not None:
        A = u.A.to(gh.dtype)
        if mask is not None:
            gx2 += mask.mul_(gh @ A).to(gx2.dtype)
        else:
            _addmm_(gx2, gh, A, 1.0)
    return gA, gB


class _UpdateFunction(torch.autograd.Function):
    """The updates alone, on the output of any layer; saves x, h and the small factors."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, how: _How, *tensors: Tensor) -> Tensor:
        out, thin = _updated(y, x, _factors(how, tensors), how.seeds, how.float32)
        ctx.how = how
        ctx.save_for_backward(x, *tensors, *thin)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        how: _How = ctx.how
        n = 2 * len(how.updates)
        x, *rest = ctx.saved_tensors
        tensors, thin = rest[:n], rest[n:]
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            zero = g.new_zeros(g.shape)
            out = _plain_updates(zero, x, _factors(how, tensors), how.seeds, how.float32)
            return (g, *_again(out, (x, None, *tensors), needs[1:], g))
        g2 = g.reshape(-1, g.shape[-1])
        x2 = _as_matrix(x, g.dtype, how.float32)
        gx2 = x2.new_zeros(x2.shape, dtype=g.dtype) if needs[1] else None
        grads: list[Tensor | None] = []
        for i, u in enumerate(_factors(how, tensors)):
            wanted = (needs[3 + 2 * i], needs[4 + 2 * i])
            grads += _update_backward(g2, x2, thin[i], u, how.seeds[i], wanted, gx2)
        gx = gx2.view(x.shape).to(x.dtype) if gx2 is not None else None
        return (g, gx, None, *grads)


def _again(
    out: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool], g: Tensor
) -> tuple[Tensor | None, ...]:
    """Differentiate the textbook formula, for a backward that is itself differentiated."""
    wanted = [t for t, need in zip(inputs, needs, strict=True) if t is not None and need]
    found = iter(torch.autograd.grad(out, wanted, g, create_graph=True))
    return tuple(
        next(found) if t is not None and need else None
        for t, need in zip(inputs, needs, strict=True)
    )


def embedding(
    base: Tensor, ids: Tensor, updates: Sequence[Factors], padding_idx: int | None
) -> Tensor:
    """Add low-rank updates to looked-up rows: `base + scale * A[:, ids]^T B^T`.

    Args:
        base: `(..., dim)`, the rows of the frozen table; never modified.
        ids: `(...)`, integer.
        updates: A `(rank, num)`, B `(dim, rank)`. Dropout drops whole tokens: the input of A is a
            one-hot vector.
        padding_idx: The row that receives no gradient, as in `nn.Embedding`.

    Returns:
        `(..., dim)`, in the dtype of `base`.
    """
    out = base
    for u in updates:
        h = F.embedding(ids, u.A.t())
        if u.dropout:
            h = h * F.dropout(h.new_ones(*h.shape[:-1], 1), u.dropout)
        update = F.linear(h, u.B)
        if padding_idx is not None:
            # Padding tokens see the update but teach it nothing, as in the dense table.
            update = torch.where((ids == padding_idx).unsqueeze(-1), update.detach(), update)
        out = (out + u.scale * update).to(base.dtype)
    return out


def renormalised(rows: Tensor, max_norm: float, p: float) -> Tensor:
    """Scale rows down to a norm, as `nn.Embedding(max_norm=...)` does to its table, differentiably.

    Args:
        rows: `(..., dim)`; never modified.
        max_norm: The largest norm that a row may have.
        p: Which norm.

    Returns:
        `(..., dim)`: bit for bit what `torch.embedding_renorm_` would leave in those rows.
    """
    if _needs_plain_operations():
        return _scaled_down(rows, max_norm, p)
    return _Renormalised.apply(rows, max_norm, p)  # type: ignore[no-untyped-call,no-any-return]


def _scaled_down(rows: Tensor, max_norm: float, p: float) -> Tensor:
    norm = torch.linalg.vector_norm(rows, p, dim=-1, keepdim=True)
    return torch.where(norm > max_norm, rows * (max_norm / (norm + 1e-7)), rows)


class _Renormalised(torch.autograd.Function):
    """torch's own renormalisation forward, the derivative of its formula backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, max_norm: float, p: float) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.how = (max_norm, p)
        out = rows.reshape(-1, rows.shape[-1]).clone()
        torch.embedding_renorm_(out, torch.arange(len(out), device=out.device), max_norm, p)
        return torch.ops.aten._unsafe_view.default(out, rows.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = rows if twice else rows.detach().requires_grad_()
            out = _scaled_down(leaf, *ctx.how)
        (grad,) = torch.autograd.grad(out, leaf, g, create_graph=twice)
        return grad, None, None


def routed_embedding(
    base: Tensor,
    ids: Tensor,
    rows: Tensor,
    adapters: Sequence[Sequence[Factors]],
    padding_idx: int | None,
) -> Tensor:
    """Add to each row of a batch of looked-up rows the update of its own adapter.

    Args:
        base: `(batch, ..., dim)`; never modified.
        ids: `(batch, ...)`, integer.
        rows: `(batch,)`, int64: 0 for the base, else 1 + the index of the row's adapter.
        adapters: The updates of each adapter.
        padding_idx: As in `embedding`.

    Returns:
        `(batch, ..., dim)`, in the dtype of `base`.
    """
    # A table of ids is small; the rows of each adapter are taken together.
    out = base
    for index, updates in enumerate(adapters):
        where = (rows == index + 1).nonzero().squeeze(1)
        changed = embedding(
            base.index_select(0, where), ids.index_select(0, where), updates, padding_idx
        )
        out = out.index_copy(0, where, changed)
    return out


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
        dtype = torch.float32 if float32 and y.dtype != torch.float64 else y.dtype
        pairs = [_one_pair(updates, y.shape[-1], dtype) for updates in adapters]
        rank = max(A.shape[0] for A, _ in pairs)
        base = (pairs[0][0].new_zeros(rank, x.shape[-1]), pairs[0][1].new_zeros(y.shape[-1], rank))
        padded = [
            (F.pad(A, (0, 0, 0, rank - len(A))), F.pad(B, (0, rank - len(A)))) for A, B in pairs
        ]
        A_bank, B_bank = (torch.stack(bank) for bank in zip(base, *padded, strict=True))
        x3 = x.reshape(x.shape[0], -1, x.shape[-1])
        x3 = _routed_dropout(x3, rows, [updates[0].dropout for updates in adapters])
        y3 = y.reshape(y.shape[0], -1, y.shape[-1])
        if _needs_plain_operations() or not torch.is_grad_enabled():
            return _routed(y3, x3, rows, A_bank, B_bank)[0].view(y.shape)
        out: Tensor = _RoutedFunction.apply(y3, x3, rows, A_bank, B_bank)  # type: ignore[no-untyped-call]
        return out.view(y.shape)


def _routed(
    y3: Tensor, x3: Tensor, rows: Tensor, A_bank: Tensor, B_bank: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the routed output `(batch, n, out)` and `h = x A^T`, in the dtype of the banks."""
    left = A_bank.index_select(0, rows).transpose(1, 2)
    right = B_bank.index_select(0, rows).transpose(1, 2)
    h = torch.bmm(x3.to(left.dtype), left)
    if y3.dtype == h.dtype:
        return torch.baddbmm(y3, h, right), h
    return torch.baddbmm(y3.to(h.dtype), h, right).to(y3.dtype), h


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
            return (g, *_again(out, (x3, None, A_bank, B_bank), needs[1:], g))
        gw = g.to(h.dtype)
        gh = torch.bmm(gw, B_bank.index_select(0, rows))
        gx = gA = gB = None
        if needs[1]:
            gx = torch.bmm(gh, A_bank.index_select(0, rows)).to(x3.dtype)
        if needs[3]:
            each = torch.bmm(gh.transpose(1, 2), x3.to(gh.dtype))
            gA = torch.zeros_like(A_bank).index_add_(0, rows, each)
        if needs[4]:
            each = torch.bmm(h.transpose(1, 2), gw).transpose(1, 2)
            gB = torch.zeros_like(B_bank).index_add_(0, rows, each)
        return g, gx, None, gA, gB


def _one_pair(updates: Sequence[Factors], out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return one plain pair `(R, in)`, `(out, R)` that equals all updates, scale in B."""
    As, Bs = [], []
    for u in updates:
        As.append(u.A.to(dtype))
        B = u.B.to(dtype) * u.scale
        Bs.append(B if u.spans is None else _spread(B, u.spans, out))
    return (As[0], Bs[0]) if len(As) == 1 else (torch.cat(As), torch.cat(Bs, dim=1))


def _routed_dropout(x3: Tensor, rows: Tensor, dropouts: Sequence[float]) -> Tensor:
    """Drop elements of each row with the probability of its adapter."""
    if not any(dropouts):
        return x3
    p = torch.tensor((0.0, *dropouts), device=x3.device, dtype=x3.dtype)[rows].view(-1, 1, 1)
    keep = torch.rand_like(x3) >= p
    return x3 * keep / (1 - p)


def _spread(B: Tensor, spans: Spans, out: int) -> Tensor:
    """Spread a stacked B over all outputs: `(..., adapted, rank)` to `(..., out, rank * parts)`."""
    rank, parts, pieces, end, row = B.shape[-1], len(spans), [], 0, 0
    for part, (start, stop) in enumerate(spans):
        pieces.append(B.new_zeros(*B.shape[:-2], start - end, rank * parts))
        piece = B[..., row : row + stop - start, :]
        pieces.append(F.pad(piece, (part * rank, (parts - part - 1) * rank)))
        end, row = stop, row + stop - start
    pieces.append(B.new_zeros(*B.shape[:-2], out - end, rank * parts))
    return torch.cat(pieces, dim=-2)


# ------------------------------------------------------------------------------ effective weight


def effective_weight(
    weight: Tensor, updates: Sequence[tuple[SiteSpec, Tensor, Tensor, float]], *, float32: bool
) -> Tensor:
    """Form `W + sum of scale * B @ A` for a weight that is read, differentiably.

    Args:
        weight: The frozen tensor, any shape that `spec.weight_shape` states.
        updates: `(spec, A, B, scale)` for each update.
        float32: Return float32 instead of rounding to the weight's dtype.

    Returns:
        A new tensor of the weight's shape. Over a 16-bit weight the sum is formed in float32 and
        rounded once.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else None
    total = weight.to(dtype)
    for spec, A, B, scale in updates:
        matrices = total.reshape(spec.experts or 1, -1, spec.matrix_shape[1])
        left, right = _matrix_factors(spec, A.to(total.dtype), B.to(total.dtype))
        total = torch.baddbmm(matrices, left, right, alpha=scale).reshape(weight.shape)
    return total if float32 else total.to(weight.dtype)


def _matrix_factors(spec: SiteSpec, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(E, rows, R)` and `(E, R, cols)`, whose product is the matrix of `B A`."""
    experts = spec.experts or 1
    A3 = A.reshape(experts, -1, spec.in_features)
    B3 = B.reshape(experts, -1, spec.rank)
    if spec.slices is not None:
        B3 = _spread(B3, spec.spans, spec.out_features)
    return (A3.transpose(1, 2), B3.transpose(1, 2)) if spec.transposed else (B3, A3)


def dense_delta(spec: SiteSpec, A: Tensor, B: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return `scale * B @ A` in the shape of the weight: the textbook formula.

    Args:
        spec: The site.
        A: `spec.a_shape`.
        B: `spec.b_shape`.
        dtype: Dtype of the arithmetic and of the result.

    Returns:
        Tensor of `spec.weight_shape`; zero outside the adapted slices.

    Example:
        >>> spec = SiteSpec("q", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> A, B = torch.randn(2, 4), torch.randn(6, 2)
        >>> torch.equal(dense_delta(spec, A, B), 2.0 * (B.double() @ A.double()))
        True
    """
    delta = torch.zeros(spec.matrix_shape, dtype=dtype, device=A.device)
    A2 = A.detach().to(dtype).reshape(-1, spec.in_features)
    B2 = B.detach().to(dtype).reshape(-1, spec.rank)
    for block in spec.blocks:
        product = spec.scale * (B2[slice(*block.b)] @ A2[slice(*block.a)])
        delta[slice(*block.rows), slice(*block.cols)] = product.t() if spec.transposed else product
    return delta.reshape(spec.weight_shape)


# ------------------------------------------------------------------------------------------ fold


@dataclass(frozen=True)
class Term:
    """One low-rank update to fold into a weight.

    Attributes:
        spec: The site.
        A: `spec.a_shape`.
        B: `spec.b_shape`.
        weight: Mixing weight; -1 for the frozen start of a weight-derived init.
    """

    spec: SiteSpec
    A: Tensor
    B: Tensor
    weight: float = 1.0


@dataclass
class Tally:
    """Running sums over the row blocks of one tensor: what rounding left of the delta D.

    Attributes:
        finite: Whether every merged value is finite.
    """

    finite: bool = True
    _dd: float = field(default=0.0, repr=False)
    _ww: float = field(default=0.0, repr=False)
    _ed: float = field(default=0.0, repr=False)
    _rr: float = field(default=0.0, repr=False)

    def add(self, before: Tensor, wanted: Tensor, after: Tensor) -> None:
        """Count some rows: W in the accumulation dtype, W + D, and what is stored."""
        delta = (wanted - before).flatten()
        effect = (after.to(wanted.dtype) - before).flatten()
        self._dd += float(torch.dot(delta, delta))
        self._ww += float(before.square().sum())
        self._ed += float(torch.dot(effect, delta))
        self._rr += float((effect - delta).square().sum())
        self.finite = self.finite and math.isfinite(self._rr)

    @property
    def delta_norm(self) -> float:
        """Frobenius norm of the delta."""
        return math.sqrt(self._dd)

    @property
    def weight_norm(self) -> float:
        """Frobenius norm of the weight."""
        return math.sqrt(self._ww)

    @property
    def kept(self) -> float:
        """`<W_merged - W, D> / <D, D>`: 1 where the delta survived, 0 where it was rounded away."""
        return self._ed / self._dd if self._dd else 1.0

    @property
    def error(self) -> float:
        """`|W_merged - W - D| / |D|`: relative error of the delta that the weights really got."""
        return math.sqrt(self._rr / self._dd) if self._dd else 0.0


def fold_rows(
    rows: Tensor,
    start: int,
    terms: Sequence[Term],
    dtype: torch.dtype | None = None,
    tally: Tally | None = None,
) -> Tensor:
    """Return some rows of the weight matrix with all terms added, rounded once.

    Args:
        rows: `(n, cols)`: rows `start` to `start + n` of the weight matrix; never modified.
        start: Index of the first row.
        terms: The updates.
        dtype: Dtype of the result; that of `rows` by default.
        tally: Counts what rounding left, where given.

    Returns:
        `(n, cols)`. Accumulated in float32, or in float64 for a float64 weight. Values outside
        every block come back with the same bits.
    """
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    total = rows.to(wide, copy=True)
    fold_rows_(total, start, terms)
    merged = total.to(dtype or rows.dtype)
    if tally is not None:
        tally.add(rows.to(wide), total, merged)
    return merged


def fold_rows_(rows: Tensor, start: int, terms: Sequence[Term]) -> None:
    """Add all terms to some rows of a float32 or float64 weight matrix, in place.

    Args:
        rows: `(n, cols)`: rows `start` to `start + n` of the weight matrix.
        start: Index of the first row.
        terms: The updates.
    """
    for term in terms:
        A = term.A.reshape(-1, term.spec.in_features)
        B = term.B.reshape(-1, term.spec.rank)
        scale = term.spec.scale * term.weight
        for block in term.spec.blocks:
            _fold_block(rows, start, block, A, B, scale, term.spec.transposed)


def _fold_block(
    total: Tensor,
    start: int,
    block: Block,
    A: Tensor,
    B: Tensor,
    scale: float,
    transposed: bool,
) -> None:
    """Add the part of one block that falls on rows `start` to `start + n`."""
    first, last = max(block.rows[0], start), min(block.rows[1], start + total.shape[0])
    if first >= last:
        return
    a, b = A[slice(*block.a)].to(total.dtype), B[slice(*block.b)].to(total.dtype)
    left, right = (a.t(), b.t()) if transposed else (b, a)
    left = left[first - block.rows[0] : last - block.rows[0]]
    target = total[first - start : last - start, slice(*block.cols)]
    target.addmm_(left, right, alpha=scale)
