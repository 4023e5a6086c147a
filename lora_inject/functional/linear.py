"""A frozen linear layer and its low-rank updates, forward and backward.

With gradients, layer and updates are one autograd Function that keeps x, which autograd
would keep anyway, and `h = x A^T`, which is thin; without gradients they are two matrix products on
top of the layer's own. A wide matrix is never turned and never written twice. Thin ones are turned
to where a CPU multiplies them fastest, which makes a difference of up to three times: rows times
rows for `x A^T` and `g B`, a contiguous thin matrix on the left for all others.

A quantised or unknown base is called untouched, and `add_updates` adds to its output out of place:
such a layer may need its output in its own backward, or hand out a view.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.functional.dropout import (
    KEEP_UP_TO,
    Drop,
    draw_seed,
    drop_,
    dropped,
    packed,
    unpacked,
)
from lora_inject.functional.factors import (
    Factors,
    Spans,
    needs_plain_operations,
    without_autocast,
)

# Elements and least rows of one float32 block, which a core's own cache holds beside the factors.
BLOCK, BLOCK_ROWS = 3 * 2**15, 64
# Tokens of a decoding step, up to which views cost more than another order of the products saves;
# and of a training step, which has a backward to cast for as well.
FEW, FEW_TRAINED = 32, 8


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
    if needs_plain_operations():
        return add_updates(_base(x, weight, bias, transposed), x, updates, float32=float32)
    grad = torch.is_grad_enabled()
    if not grad and len(updates) == 1 and x.is_contiguous() and _is_decoding(x, u := updates[0]):
        y = _base(x, weight, bias, transposed)
        if y.dtype == x.dtype == u.A.dtype:  # `_add_decoded`, without the call
            if x.numel() == x.shape[-1]:
                y.view(-1).addmv_(u.B, torch.mv(u.A, x.view(-1)), alpha=u.scale)
                return y
            h = F.linear(x.view(-1, x.shape[-1]), u.A)
            y.view(-1, y.shape[-1]).addmm_(h, u.B.t(), alpha=u.scale)
            return y
        if y.dtype == x.dtype:  # autocast makes another of it
            _add_decoded(y, x, u)
            return y
    float32 = float32 or _few_tokens(x, updates, FEW_TRAINED if grad else FEW)
    drops = [draw_seed(u.dropout) if u.dropout else None for u in updates]
    if grad:
        tensors = [t for u in updates for t in (u.A, u.B)]
        if any(t is not None and t.requires_grad for t in (x, weight, bias, *tensors)):
            how = _How(transposed, float32, [(u.scale, u.spans) for u in updates], drops)
            return _LinearFunction.apply(x, weight, bias, how, *tensors)  # type: ignore[no-untyped-call,no-any-return]
    y = _base(x, weight, bias, transposed)
    _add(y, x, updates, drops, float32)
    return y


def add_updates(
    y: Tensor, x: Tensor, updates: Sequence[Factors], *, float32: bool = False
) -> Tensor:
    """Add low-rank updates to the output of a layer that was called untouched.

    Args:
        y: `(..., out)`, output of the layer; never modified.
        x: `(..., in)`, its input.
        updates: The updates to add.
        float32: Keep the low-rank arithmetic in float32 over a 16-bit base.

    Returns:
        `(..., out)`, in the dtype of `y`.
    """
    drops = [draw_seed(u.dropout) if u.dropout else None for u in updates]
    if needs_plain_operations():
        return _plain(y, x, updates, drops, float32)
    grad = torch.is_grad_enabled()
    float32 = float32 or _few_tokens(x, updates, FEW_TRAINED if grad else FEW)
    if grad:
        tensors = [t for u in updates for t in (u.A, u.B)]
        if any(t.requires_grad for t in (y, x, *tensors)):
            how = _How(False, float32, [(u.scale, u.spans) for u in updates], drops)
            return _UpdateFunction.apply(y, x, how, *tensors)  # type: ignore[no-untyped-call,no-any-return]
    out = torch.empty_like(y, memory_format=torch.contiguous_format).copy_(y)
    _add(out, x, updates, drops, float32)
    return out


def _base(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Compute the frozen layer exactly as its own class does, bit for bit."""
    if not transposed:
        return F.linear(x, weight, bias).contiguous()
    # transformers.pytorch_utils.Conv1D.forward
    size_out = (*x.shape[:-1], weight.shape[1])
    if bias is None:
        return (x.reshape(-1, x.shape[-1]) @ weight).view(size_out)
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(size_out)


def _compute_dtype(dtype: torch.dtype, float32: bool) -> torch.dtype:
    return torch.float32 if float32 and dtype != torch.float64 else dtype


# ----------------------------------------------------------------------- the textbook's operations


def _plain(
    y: Tensor, x: Tensor, updates: Iterable[Factors], drops: Sequence[Drop | None], float32: bool
) -> Tensor:
    """The formula in operations that autograd, torch.func and torch.compile know."""
    with torch.autocast(y.device.type, enabled=False):
        x2 = x.reshape(-1, x.shape[-1]).to(_compute_dtype(y.dtype, float32))
        out = y.reshape(-1, y.shape[-1])
        for u, drop in zip(updates, drops, strict=True):
            h = _plain_dropout(x2, drop) @ u.A.to(x2.dtype).t()
            out = _plain_add(out, h, u)
        return out.reshape(y.shape)


def _plain_dropout(x2: Tensor, drop: Drop | None) -> Tensor:
    if drop is None:
        return x2
    if torch.compiler.is_compiling():
        return F.dropout(x2, drop.p)
    mask = drop_(torch.full_like(x2, 1 / (1 - drop.p)), dropped(drop, x2)[0])
    return x2 * mask


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


def differentiate_again(
    out: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool], g: Tensor
) -> tuple[Tensor | None, ...]:
    """Differentiate the textbook formula, for a backward that is itself differentiated.

    Args:
        out: The formula's value, with its graph.
        inputs: What it was formed from.
        needs: Which of them need a gradient.
        g: Gradient of `out`.

    Returns:
        A gradient, with its own graph, for each input that needs one.
    """
    wanted = [t for t, need in zip(inputs, needs, strict=True) if t is not None and need]
    found = iter(torch.autograd.grad(out, wanted, g, create_graph=True))
    return tuple(
        next(found) if t is not None and need else None
        for t, need in zip(inputs, needs, strict=True)
    )


# ------------------------------------------------------------------------------- the fast products


def _add(
    y: Tensor,
    x: Tensor,
    updates: Iterable[Factors],
    drops: Sequence[Drop | None],
    float32: bool,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Add all updates to a contiguous y, in place.

    Returns:
        For each update `h = drop(x) A^T`, `(n, rank * parts)`, and the positions that were dropped,
        packed, where they are worth keeping.
    """
    y2 = y if y.dim() == 2 else y.view(-1, y.shape[-1])
    x2 = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    dtype = _compute_dtype(y.dtype, float32)
    thin: list[Tensor] = []
    positions: list[Tensor | None] = []
    for u, drop in zip(updates, drops, strict=True):
        plain = drop is None and y2.dtype == x2.dtype and u.A.dtype == dtype
        if plain and _is_decoding(x2, u):
            thin.append(_add_decoded(y2, x2, u))
            positions.append(None)
            continue
        kept, scale = None, u.scale
        inputs = x2
        if drop is not None:
            where, gaps = dropped(drop, x2)
            inputs, scale = drop_(_own(x2), where), scale / (1 - drop.p)
            kept = packed(gaps) if drop.p <= KEEP_UP_TO else None
        A, near = _cast(u.A, dtype), inputs.dtype != dtype
        hs = [_times_turned(x, A, near) for (x,) in _blocks(dtype, inputs)]
        h = hs[0] if len(hs) == 1 else torch.cat(hs)
        _add_parts(y2, h, u, scale)
        thin.append(h)
        positions.append(kept)
    return thin, positions


def _is_decoding(x: Tensor, u: Factors) -> bool:
    """Whether time is in the number of operations: a token or a few, and one plain update."""
    if x.numel() > FEW * x.shape[-1] or u.spans is not None or u.dropout:
        return False
    dtype = u.A.dtype
    return 2 < dtype.itemsize >= x.dtype.itemsize and dtype == u.B.dtype


def _add_decoded(y: Tensor, x: Tensor, u: Factors) -> Tensor:
    """Add an update to a y of few tokens in place, in the dtype of its factors.

    A single token is a vector, which takes torch two thirds of the time of a matrix.

    Args:
        y: `(..., out)`.
        x: `(..., in)`, a matrix or contiguous: else torch would choose its product by
            `A.requires_grad`, and an adapter would give other bits after loading.
        u: The update.

    Returns:
        `x A^T`, `(..., rank)`.
    """
    if y.dtype == u.A.dtype == x.dtype and x.numel() == x.shape[-1]:
        vector = torch.mv(u.A, x.reshape(-1))
        y.view(-1).addmv_(u.B, vector, alpha=u.scale)
        return vector.view(*x.shape[:-1], -1)
    h = F.linear(_cast(x, u.A.dtype), u.A)
    if y.dtype == h.dtype:
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), u.B.t(), alpha=u.scale)
    else:
        y.copy_(torch.add(y, F.linear(h, u.B), alpha=u.scale))
    return h


def _few_tokens(x: Tensor, updates: Sequence[Factors], few: int) -> bool:
    """Whether casting x and y to float32 is cheaper than casting A and B to 16 bits.

    It is for `n (in + 2 out)` elements against `rank (in + out)`, and rounds less; for `few` tokens
    it takes the fewest operations.
    """
    A = updates[0].A
    if A.dtype == x.dtype or x.dtype.itemsize != 2 or A.dtype != torch.float32:
        return False
    return 2 * x.numel() <= x.shape[-1] * max(A.shape[0], 2 * few)


def _own(x2: Tensor) -> Tensor:
    return x2.clone(memory_format=torch.contiguous_format)


def _blocks(dtype: torch.dtype, *matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield matrices of equally many rows in `dtype`: whole, or in blocks where one must be cast.

    A block stays in the cache from its cast to its product, in the same memory as the one before,
    so it is to be used before the next is asked for. Casting a whole matrix would write it to
    memory, read it back, and take the kernel's time for fresh pages.
    """
    if all(m.dtype == dtype for m in matrices):
        yield matrices
        return
    n_rows = max(BLOCK_ROWS, BLOCK // max(m.shape[1] for m in matrices))
    rooms = [m.new_empty(min(n_rows, m.shape[0]), m.shape[1], dtype=dtype) for m in matrices]
    for blocks in zip(*(torch.split(m, n_rows) for m in matrices), strict=True):
        yield tuple(
            room[: block.shape[0]].copy_(block) for room, block in zip(rooms, blocks, strict=True)
        )


def _times_turned(wide: Tensor, thin: Tensor, near: bool) -> Tensor:
    """Return `wide @ thin^T`, for a thin matrix of contiguous rows.

    Args:
        wide: `(n, width)`.
        thin: `(few, width)`.
        near: Whether `wide` is in the cache. Then the thin matrix is better on the left, where the
            result comes out turned; far away turning the wide one takes longer than the product.

    Returns:
        `(n, few)`.
    """
    return torch.mm(thin, wide.t()).t() if near else torch.mm(wide, thin.t())


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def _add_parts(y2: Tensor, h: Tensor, u: Factors, scale: float) -> None:
    """Add `scale * h B^T` to y2 in place, part by part."""
    B = _cast(u.B, h.dtype)
    if u.spans is None:
        _addmm_(y2, h, _turned(B), scale)
        return
    rank, row = B.shape[1], 0
    for part, (start, stop) in enumerate(u.spans):
        rows, cols = B[row : row + stop - start], slice(part * rank, (part + 1) * rank)
        _addmm_(y2[:, start:stop], h[:, cols].contiguous(), _turned(rows), scale)
        row += stop - start


def _turned(thin: Tensor) -> Tensor:
    """Return a thin matrix transposed, in memory of its own."""
    return thin.t().contiguous()


def _addmm_(y2: Tensor, left: Tensor, right: Tensor, scale: float, beta: int = 1) -> None:
    """`y2 = beta * y2 + scale * left @ right` for thin factors, rounding once.

    Float32 factors over a 16-bit y2 are split into a high and a low 16-bit half each, and the three
    products that matter go into one matrix product, which accumulates in float32: 16 bits of the
    update are right, y2 keeps 8, and no float32 copy of y2 is made. A few rows are copied instead.
    """
    if y2.dtype != left.dtype and y2.shape[0] <= left.shape[1]:
        y2.copy_(y2.to(left.dtype).addmm_(left, right, beta=beta, alpha=scale))
        return
    if y2.dtype != left.dtype:
        left_high, right_high = left.to(y2.dtype), right.to(y2.dtype)
        left_low = left.sub(left_high).to(y2.dtype)
        right_low = right.sub(right_high).to(y2.dtype)
        left = torch.cat([left_high, left_low, left_high], dim=1)
        right = torch.cat([right_high, right_high, right_low])
    y2.addmm_(left, right, beta=beta, alpha=scale)


class _Share(NamedTuple):
    """What one update adds to the gradient of x: `scale * gh A`, but not where x was dropped."""

    gh: Tensor
    A: Tensor
    scale: float
    where: Tensor | None


class _How(NamedTuple):
    """What the Functions need beside tensors."""

    transposed: bool
    float32: bool
    updates: Sequence[tuple[float, Spans | None]]
    drops: Sequence[Drop | None]

    def factors(self, tensors: Sequence[Tensor]) -> list[Factors]:
        return [
            Factors(tensors[2 * i], tensors[2 * i + 1], scale, spans)
            for i, (scale, spans) in enumerate(self.updates)
        ]


def _add_in_function(y: Tensor, x: Tensor, how: _How, tensors: Sequence[Tensor]) -> Any:
    factors = how.factors(tensors)
    context = without_autocast(y)
    if context is None:
        return _add(y, x, factors, how.drops, how.float32)
    with context:
        return _add(y, x, factors, how.drops, how.float32)


class _LinearFunction(torch.autograd.Function):
    """Frozen layer and updates in one node; saves x, h and the small factors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: _How, *tensors: Tensor
    ) -> Tensor:
        y = _base(x, weight, bias, how.transposed)
        thin, positions = _add_in_function(y, x, how, tensors)
        ctx.how = how
        ctx.save_for_backward(x, weight, bias, *tensors, *thin, *positions)
        # F.linear answers a batch with a view of a matrix, and autograd forbids to change a view
        # that a Function returns; models do change a layer's output in place.
        return torch.ops.aten._unsafe_view.default(y, y.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        how: _How = ctx.how
        x, weight, bias, *rest = ctx.saved_tensors
        needs = ctx.needs_input_grad
        n = len(how.updates)
        if torch.is_grad_enabled():
            y = _base(x, weight, bias, how.transposed)
            tensors = rest[: 2 * n]
            out = _plain(y, x, how.factors(tensors), how.drops, how.float32)
            return differentiate_again(out, (x, weight, bias, None, *tensors), needs, g)
        g2 = g.reshape(-1, g.shape[-1])
        gx2 = gw = gb = None
        grads, shares = _updates_backward(g2, x, how, rest, needs[4:])
        if needs[0]:
            gx2 = torch.mm(g2, _cast(weight.t() if how.transposed else weight, g.dtype))
            for share in shares:
                _add_to_input(gx2, share)
        if needs[1]:
            x2 = _cast(x.reshape(-1, x.shape[-1]), g.dtype)
            gw = _cast(x2.t() @ g2 if how.transposed else g2.t() @ x2, weight.dtype)
        if bias is not None and needs[2]:
            gb = _cast(g2.sum(0), bias.dtype)
        return (_shaped(gx2, x), gw, gb, None, *grads)


class _UpdateFunction(torch.autograd.Function):
    """The updates alone, on the output of any layer; saves x, h and the small factors."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, how: _How, *tensors: Tensor) -> Tensor:
        out = torch.empty_like(y, memory_format=torch.contiguous_format).copy_(y)
        thin, positions = _add_in_function(out, x, how, tensors)
        ctx.how = how
        ctx.save_for_backward(x, *tensors, *thin, *positions)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        how: _How = ctx.how
        x, *rest = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            tensors = rest[: 2 * len(how.updates)]
            zero = g.new_zeros(g.shape)
            out = _plain(zero, x, how.factors(tensors), how.drops, how.float32)
            return (g, *differentiate_again(out, (x, None, *tensors), needs[1:], g))
        g2, gx2 = g.reshape(-1, g.shape[-1]), None
        grads, shares = _updates_backward(g2, x, how, rest, needs[3:])
        if needs[1]:
            gx2 = g2.new_empty(g2.shape[0], x.shape[-1])
            for i, share in enumerate(shares):
                _add_to_input(gx2, share, beta=int(i > 0))
        return (g, _shaped(gx2, x), None, *grads)


def _shaped(gx2: Tensor | None, x: Tensor) -> Tensor | None:
    return None if gx2 is None else _cast(gx2.view(x.shape), x.dtype)


def _updates_backward(
    g2: Tensor,
    x: Tensor,
    how: _How,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[list[Tensor | None], list[_Share]]:
    """Return the gradients of every A and B, and what each update adds to that of x.

    The sum is for the caller to form: over the layer's own gradient of x, or over nothing.
    """
    n = len(how.updates)
    tensors, thin, positions = saved[: 2 * n], saved[2 * n : 3 * n], saved[3 * n :]
    dtype = _compute_dtype(g2.dtype, how.float32)
    x2 = x.reshape(-1, x.shape[-1])
    grads: list[Tensor | None] = []
    shares: list[_Share] = []
    for i, u in enumerate(how.factors(tensors)):
        drop, where, scale, inputs = how.drops[i], None, u.scale, x2
        if drop is not None:
            kept = positions[i]
            where = dropped(drop, x2)[0] if kept is None else unpacked(kept)
            scale = scale / (1 - drop.p)
            inputs = drop_(_own(x2), where) if needs[2 * i] else x2
        gh, gA, gB = _thin_gradients(dtype, g2, inputs, thin[i], u, needs[2 * i : 2 * i + 2])
        shares.append(_Share(gh, _cast(u.A, dtype), scale, where))
        grads.append(None if gA is None else _cast(gA.mul_(scale), u.A.dtype))
        grads.append(None if gB is None else _cast(gB.mul_(scale), u.B.dtype))
    return grads, shares


def _thin_gradients(
    dtype: torch.dtype, g2: Tensor, x2: Tensor, h: Tensor, u: Factors, needs: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return `g B`, `(n, rank * parts)`, and the gradients of A and B, all without the scale.

    Args:
        dtype: What to compute in.
        g2: `(n, out)`.
        x2: `(n, in)`, after dropout.
        h: `(n, rank * parts)`.
        u: The update.
        needs: Whether the gradients of A and of B are wanted.
    """
    B, near = _cast(u.B, dtype), not g2.dtype == x2.dtype == dtype
    if u.spans is None and not near:  # most steps: as few operations as there can be
        gh = torch.mm(g2, _turned(B).t())
        gA = torch.mm(_turned(gh), x2) if needs[0] else None
        return gh, gA, torch.mm(_turned(h), g2).t() if needs[1] else None
    rank, spans = B.shape[1], u.spans or ((0, g2.shape[1]),)
    widths = [stop - start for start, stop in spans]
    thin = [_turned(rows) for rows in torch.split(B, widths)]
    turned = [_turned(part) for part in torch.split(h, rank, dim=1)]
    gA, gBs, ghs, row = None, dict[int, Tensor](), [], 0
    for g_block, x_block in _blocks(dtype, g2, x2):
        rows, parts = slice(row, row + g_block.shape[0]), []
        row = rows.stop
        for k, (start, stop) in enumerate(spans):
            g = g_block if u.spans is None else g_block[:, start:stop]
            parts.append(_times_turned(g, thin[k], near))
            if needs[1]:
                gBs[k] = _plus(gBs.get(k), turned[k][:, rows], g)
        ghs.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        if needs[0]:
            gA = _plus(gA, _turned(ghs[-1]), x_block)
    gh = ghs[0] if len(ghs) == 1 else torch.cat(ghs)
    return gh, gA, _below([part.t() for part in gBs.values()])


def _plus(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return `total + left @ right`, in the memory of `total`."""
    return torch.mm(left, right) if total is None else total.addmm_(left, right)


def _below(parts: list[Tensor]) -> Tensor | None:
    """Return matrices one below the other, None where there are none."""
    return None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)


def _add_to_input(gx2: Tensor, share: _Share, beta: int = 1) -> None:
    """Form `beta * gx2 + share` in place; where x was dropped, there is no share."""
    gh, A, scale, where = share
    if where is None or not beta:
        _addmm_(gx2, gh, A, scale, beta)
    if where is None:
        return
    flat = gx2.view(-1)
    if not beta:
        flat.index_fill_(0, where, 0.0)
        return
    kept = flat.index_select(0, where)  # put back: half the time of an update with zeros, added
    _addmm_(gx2, gh, A, scale)
    flat.index_copy_(0, where, kept)
