"""One adapter for each row of a batch, in two batched products.

Rows of one adapter are put together in groups of equal size, so that the cost does not grow with
the number of adapters, and an adapter's factors are read about once (Punica, arXiv:2310.18547, has
the same idea as a GPU kernel). A row meets the factors of its own adapter only: what is broken in
another one does not reach it. Nothing is kept from one forward to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.functional.factors import (
    Factors,
    compute_dtype,
    needs_plain_operations,
    spread,
)
from lora_inject.functional.linear import differentiate_again


class Rows(NamedTuple):
    """Which adapter each row of a batch has.

    Attributes:
        places: `(batch,)`, int64: 0 for the base, else 1 + the index of the row's adapter.
        owners: `(groups,)`, int64: the index of each group's adapter.
        slots: `(groups * size,)`, int64: the row in each place of each group; a place that is left
            over holds a row of the same group again.
        mine: `(k,)`, int64: the rows that have an adapter.
        at: `(k,)`, int64: where in `slots` each of them stands.
    """

    places: Tensor
    owners: Tensor
    slots: Tensor
    mine: Tensor
    at: Tensor


def rows_of(places: Sequence[int], device: torch.device) -> Rows:
    """Arrange the rows of a batch in groups.

    Args:
        places: For each row 0 for the base, else 1 + the index of its adapter. One is not 0.
        device: Where the batch is.

    Example:
        >>> rows = rows_of([2, 0, 1, 2, 2], torch.device("cpu"))
        >>> rows.owners.tolist(), rows.slots.tolist(), rows.mine.tolist(), rows.at.tolist()
        ([0, 1, 1], [2, 2, 0, 3, 4, 4], [2, 0, 3, 4], [0, 2, 3, 4])
    """
    of: dict[int, list[int]] = {place: [] for place in sorted(set(places)) if place}
    for row, place in enumerate(places):
        if place:
            of[place].append(row)
    # At this size there are at most twice as many groups as adapters, and places as rows.
    size = -(-sum(map(len, of.values())) // len(of))
    owners, slots, mine, at = list[int](), list[int](), list[int](), list[int]()
    for place, rows in of.items():
        for start in range(0, len(rows), size):
            group = rows[start : start + size]
            at += range(len(slots), len(slots) + len(group))
            mine += group
            slots += group + group[-1:] * (size - len(group))
            owners.append(place - 1)
    with torch.inference_mode(False):  # a backward may need them, whoever asks first
        return Rows(*(torch.tensor(t, device=device) for t in (places, owners, slots, mine, at)))


def routed_update(
    y: Tensor,
    x: Tensor,
    rows: Rows | Tensor,
    adapters: Sequence[Sequence[Factors]],
    *,
    float32: bool,
    in_place: bool = False,
) -> Tensor:
    """Add to each row of a batch the update of its own adapter.

    Unequal ranks are padded with zeros.

    Args:
        y: `(batch, ..., out)`.
        x: `(batch, ..., in)`.
        rows: Which adapter each row has. Under tracers, which cannot know the groups, the `places`
            alone.
        adapters: The updates of each adapter.
        float32: Keep the arithmetic in float32 over a 16-bit base.
        in_place: Whether y may be modified where no gradient is needed: nobody else has it.

    Returns:
        `(batch, ..., out)`, in the dtype of `y`. Rows of the base keep their bits.

    Example:
        >>> A, B = torch.randn(2, 4), torch.randn(6, 2)
        >>> y, x = torch.zeros(2, 1, 6), torch.randn(2, 1, 4)
        >>> adapters = [[Factors(A, B, 0.5)]]
        >>> found = routed_update(y, x, rows_of([1, 0], y.device), adapters, float32=False)
        >>> torch.allclose(found[0], 0.5 * x[0] @ A.T @ B.T, atol=1e-6), bool(found[1].any())
        (True, False)
    """
    with torch.autocast(y.device.type, enabled=False):
        dtype = compute_dtype(y.dtype, float32)
        index = rows if isinstance(rows, Tensor) else rows.places
        A_bank, B_bank = bank(adapters, y.shape[-1], dtype, base=rows is index)
        x3 = x.reshape(x.shape[0], -1, x.shape[-1])
        y3 = y.reshape(y.shape[0], -1, y.shape[-1])
        x3 = _routed_dropout(x3, index, [updates[0].dropout for updates in adapters])
        if isinstance(rows, Tensor):
            return _by_row(y3, x3, rows, A_bank, B_bank).view(y.shape)
        if needs_plain_operations() or not torch.is_grad_enabled():
            alone = in_place and not needs_plain_operations()
            return _by_group(y3, x3, rows, A_bank, B_bank, alone)[0].view(y.shape)
        out: Tensor = _RoutedFunction.apply(y3, x3, rows, A_bank, B_bank)  # type: ignore[no-untyped-call]
        return out.view(y.shape)


def bank(
    adapters: Sequence[Sequence[Factors]], out: int, dtype: torch.dtype, *, base: bool = False
) -> tuple[Tensor, Tensor]:
    """Stack adapters, each as one plain pair that equals all its updates, scale and spans included.

    Args:
        adapters: The updates of each of `n` adapters.
        out: Width of the output.
        dtype: What to stack in.
        base: Put zeros before the first, which stand for no adapter.

    Returns:
        A `(n, R, in)` and B `(n, out, R)`; smaller ranks are padded with zeros.
    """
    pairs = [_one_pair(updates, out, dtype) for updates in adapters]
    rank = max(A.shape[0] for A, _, _ in pairs)
    scales = [scale for _, _, scale in pairs]
    even = len(set(scales)) == 1
    padded = [(_padded(A, rank), _padded(B if even else B * s, rank, 1)) for A, B, s in pairs]
    if base:
        A, B = padded[0]
        padded.insert(0, (torch.zeros_like(A), torch.zeros_like(B)))
    As, Bs = zip(*padded, strict=True)
    B = torch.stack(Bs)
    return torch.stack(As), B * scales[0] if even and scales[0] != 1.0 else B


def _by_row(y3: Tensor, x3: Tensor, index: Tensor, A_bank: Tensor, B_bank: Tensor) -> Tensor:
    """Return the routed output with a copy of the factors for each row; for tracers."""
    h = torch.bmm(x3.to(A_bank.dtype), A_bank.index_select(0, index).mT)
    right = B_bank.index_select(0, index).mT
    if y3.dtype == h.dtype:
        return torch.baddbmm(y3, h, right)
    return torch.baddbmm(y3.to(h.dtype), h, right).to(y3.dtype)


def _by_group(
    y3: Tensor, x3: Tensor, rows: Rows, A_bank: Tensor, B_bank: Tensor, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the routed output `(batch, n, out)`, and `h = x A^T`, `(groups, size * n, R)`."""
    A, B = _of_groups(A_bank, rows), _of_groups(B_bank, rows)
    h = torch.bmm(_in_groups(x3, rows).to(A.dtype), A.mT)
    update = torch.bmm(h, B.mT).view(-1, *y3.shape[1:]).index_select(0, rows.at)
    if y3.dtype != h.dtype:
        return torch.index_add(y3.to(h.dtype), 0, rows.mine, update).to(y3.dtype), h
    if in_place:
        return y3.index_add_(0, rows.mine, update), h
    return torch.index_add(y3, 0, rows.mine, update), h


def _in_groups(t: Tensor, rows: Rows) -> Tensor:
    """Return rows `(batch, n, width)` by groups, `(groups, size * n, width)`."""
    return t.index_select(0, rows.slots).view(len(rows.owners), -1, t.shape[-1])


def _of_groups(factors: Tensor, rows: Rows) -> Tensor:
    """Return the factors of each group; adapters stand in the order of their groups."""
    alike = len(rows.owners) == len(factors)
    return factors if alike else factors.index_select(0, rows.owners)


class _RoutedFunction(torch.autograd.Function):
    """Saves x, h and the banks; what is gathered from them is gathered again."""

    @staticmethod
    def forward(
        ctx: Any, y3: Tensor, x3: Tensor, rows: Rows, A_bank: Tensor, B_bank: Tensor
    ) -> Tensor:
        out, h = _by_group(y3, x3, rows, A_bank, B_bank)
        ctx.rows = rows
        ctx.save_for_backward(x3, A_bank, B_bank, h)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows: Rows = ctx.rows
        x3, A_bank, B_bank, h = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            out, _ = _by_group(g.new_zeros(g.shape), x3, rows, A_bank, B_bank)
            return (g, *differentiate_again(out, (x3, None, A_bank, B_bank), needs[1:], g))
        A, B = _of_groups(A_bank, rows), _of_groups(B_bank, rows)
        # Left-over places have no gradient.
        gw = g.new_zeros(len(rows.slots), *g.shape[1:], dtype=h.dtype)
        gw.index_copy_(0, rows.at, g.index_select(0, rows.mine).to(h.dtype))
        gw = gw.view(len(A), -1, g.shape[-1])
        gh = torch.bmm(gw, B)
        gx = gA = gB = None
        if needs[1]:
            each = torch.bmm(gh, A).view(-1, *x3.shape[1:]).index_select(0, rows.at).to(x3.dtype)
            gx = torch.zeros_like(x3).index_copy_(0, rows.mine, each)
        if needs[3]:
            gA = _summed(torch.bmm(gh.mT, _in_groups(x3, rows).to(gh.dtype)), rows, A_bank)
        if needs[4]:
            gB = _summed(torch.bmm(gw.mT, h), rows, B_bank)
        return g, gx, None, gA, gB


def _summed(each: Tensor, rows: Rows, factors: Tensor) -> Tensor:
    """Sum the gradients of groups over those of each adapter."""
    if len(each) == len(factors):
        return each
    return torch.zeros_like(factors).index_add_(0, rows.owners, each)


def _padded(t: Tensor, rank: int, dim: int = 0) -> Tensor:
    """Fill a factor up with zeros to a rank, which is its given dimension."""
    missing = rank - t.shape[dim]
    return F.pad(t, (0, missing) if dim else (0, 0, 0, missing)) if missing else t


def _one_pair(
    updates: Sequence[Factors], out: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float]:
    """Return `A (R, in)`, `B (out, R)` and a scale, as one plain pair that equals all updates."""
    if len(updates) == 1 and updates[0].spans is None:
        u = updates[0]
        return u.A.to(dtype), u.B.to(dtype), u.scale
    As = [u.A.to(dtype) for u in updates]
    Bs = [u.B.to(dtype) * u.scale for u in updates]
    wide = [
        B if u.spans is None else spread(B, u.spans, out) for B, u in zip(Bs, updates, strict=True)
    ]
    return torch.cat(As), torch.cat(wide, dim=1), 1.0


def _routed_dropout(x3: Tensor, index: Tensor, dropouts: Sequence[float]) -> Tensor:
    """Drop elements of each row with the probability of its adapter."""
    if not any(dropouts):
        return x3
    # Filled on the device: a tensor of Python numbers would be copied there in each forward.
    p = torch.stack([x3.new_full((), p) for p in (0.0, *dropouts)]).index_select(0, index)
    p = p.view(-1, 1, 1)
    return x3 * (torch.rand_like(x3) >= p) / (1 - p)
