"""The bank: adapters that are stacked, of which each row of a batch takes its own.

Updates are gathered by row, so the cost does not grow with the number of adapters (Punica,
arXiv:2310.18547, has the same idea as a GPU kernel). A row uses the factors of its own adapter
only, so NaN in another adapter does not reach it. Nothing is kept from one forward to the next,
because fused optimizers write tensors without a change of their versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_inject.core.functional.factors import Spans, cast, compute_dtype, without_autocast
from lora_inject.core.functional.plain_operations import spread
from lora_inject.core.functional.torch_inside import runs_plainly
from lora_inject.core.layers.attached import Recipe


class Bank(NamedTuple):
    """How the adapters that rows may have stand in a stack, by the names of their tensors.

    Attributes:
        A: The names of A, one after the other.
        B: The names of B.
        rank: The rank of each adapter in the stack.
        even: Whether each place is one update of that rank, or the base.
        zeros: Before which of these so many ranks of zeros stand: for the base, or as padding.
        scale: The factor on all products.
        changed: Which B is not taken as it is: its number, a factor, and its spans.
        dropouts: By which probability each place drops in training.
    """

    A: Sequence[str]
    B: Sequence[str]
    rank: int
    even: bool
    zeros: Sequence[tuple[int, int]]
    scale: float
    changed: Sequence[tuple[int, float, Spans | None]]
    dropouts: Sequence[float]


def bank_of(places: Sequence[Sequence[Recipe]]) -> Bank:
    """Return the bank of the updates that each place has; the base has none."""
    flat = [recipe for recipes in places for recipe in recipes]
    ranks = [sum(recipe.rank for recipe in recipes) for recipes in places]
    rank, end, zeros = max(ranks), 0, []
    for recipes, own in zip(places, ranks, strict=True):
        end += len(recipes)
        if own < rank:
            zeros.append((end, rank - own))
    even = all(len(each) <= 1 for each in places) and {*ranks} <= {0, rank}
    dropouts = [recipes[0].dropout if recipes else 0.0 for recipes in places]
    one_scale = all(recipe.scale == flat[0].scale for recipe in flat)
    scale = flat[0].scale if one_scale else 1.0
    factors = [1.0 if one_scale else recipe.scale for recipe in flat]
    both = enumerate(zip(factors, flat, strict=True))
    changed = [(i, factor, r.spans) for i, (factor, r) in both if r.spans or factor != 1.0]
    As, Bs = [recipe.A for recipe in flat], [recipe.B for recipe in flat]
    return Bank(As, Bs, rank, even, zeros, scale, changed, dropouts)


def routed_update(
    y: Tensor,
    x: Tensor,
    bank: Bank,
    held: Mapping[str, Tensor],
    places: Tensor | None,
    *,
    float32: bool,
    drops: bool = False,
) -> Tensor:
    """Add to each row of a batch the update of its own adapter.

    Args:
        y: `(batch, ..., out)`.
        x: `(batch, ..., in)`.
        bank: The adapters.
        held: Their tensors by name.
        places: `(batch,)`, int64: the place of each row's adapter in the stack. Fewer stand for as
            many equal runs of rows; None for one run of each place, in order, gathers nothing.
        float32: Keep the arithmetic in float32 over a 16-bit base.
        drops: Whether each row drops elements of its input with its adapter's probability.

    Returns:
        `(batch, ..., out)`, in the dtype of `y`. Rows of the base keep their bits.

    Examples:
        >>> held = {"A": torch.randn(2, 4), "B": torch.randn(6, 2)}
        >>> y, x = torch.zeros(2, 1, 6), torch.randn(2, 1, 4)
        >>> bank = bank_of([[], [Recipe("A", "B", 2, 0.5)]])
        >>> routed = routed_update(y, x, bank, held, torch.tensor([1, 0]), float32=False)
        >>> added = 0.5 * x[0] @ held["A"].T @ held["B"].T
        >>> torch.allclose(routed[0], added, atol=1e-6), bool(routed[1].any())
        (True, False)
    """
    with without_autocast(y) or nullcontext():
        dtype, n_out = compute_dtype(y.dtype, float32), y.shape[-1]
        A, B_T = stacked(bank, held, n_out, dtype)
        if places is not None:
            A, B_T = A.index_select(0, places), _picked(B_T, places)
        n, _, n_in = A.shape
        x3, y3 = x, y
        if y.dim() != 3 or y.shape[0] != n:
            x3, y3 = x.reshape(n, -1, n_in), y.reshape(n, -1, n_out)
        if drops and any(bank.dropouts):
            x3 = _routed_dropout(x3, bank.dropouts, places)
        added = torch.baddbmm(cast(y3, dtype), _thin(x3, A), B_T, alpha=bank.scale)
        out = cast(added, y.dtype)
        return out if y3 is y else out.view(y.shape)


def _picked(B_T: Tensor, places: Tensor) -> Tensor:
    """Return the B^T of each row; their memory stays in the order that it has."""
    if B_T.is_contiguous():
        return B_T.index_select(0, places)
    return B_T.mT.index_select(0, places).mT


def _thin(x3: Tensor, A: Tensor) -> Tensor:
    """Return `x A^T` in the dtype of A; backward keeps a narrower x as it is, and no wide copy."""
    if x3.dtype == A.dtype or not runs_plainly() or not torch.is_grad_enabled():
        return torch.bmm(cast(x3, A.dtype), A.mT)
    output: Tensor = _Widened.apply(x3, A)  # type: ignore[no-untyped-call]
    return output


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x3: Tensor, A: Tensor) -> Tensor:
        of_x, of_A = ctx.needs_input_grad
        ctx.save_for_backward(x3 if of_A else None, A if of_x else None)
        ctx.x_dtype = x3.dtype
        return torch.bmm(x3.to(A.dtype), A.mT)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x3, A = ctx.saved_tensors
        return (
            None if A is None else torch.bmm(g, A).to(ctx.x_dtype),
            None if x3 is None else torch.bmm(g.mT, x3.to(g.dtype)),
        )


def _routed_dropout(x3: Tensor, dropouts: Sequence[float], places: Tensor | None) -> Tensor:
    """Drop elements of each row with the probability of its place."""
    # Filled on the device: a tensor of Python numbers would be copied there in each forward.
    p = torch.stack([x3.new_full((), p) for p in dropouts])
    p = (p if places is None else p.index_select(0, places)).view(-1, 1, 1)
    return x3 * (torch.rand_like(x3) >= p) / (1 - p)


def stacked(
    bank: Bank, held: Mapping[str, Tensor], out: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Stack adapters as A and B^T, `(n, rank, in)` and `(n, rank, out)`.

    A B^T in 16 bits has the rank as rows in memory, too: as a view of a stack of B, a token of 16
    rows took three times as long, on one CPU. In 32 bits the view is faster than to make it.
    """
    As, Bs = [held[name] for name in bank.A], [held[name] for name in bank.B]
    for number, factor, spans in bank.changed:
        own = Bs[number] if factor == 1.0 else Bs[number] * factor
        Bs[number] = spread(own, spans, out)
    if bank.zeros:
        no_A, no_B = As[0].new_zeros(bank.rank, As[0].size(1)), Bs[0].new_zeros(out, bank.rank)
        for number, n in reversed(bank.zeros):
            As.insert(number, no_A[:n])
            Bs.insert(number, no_B[:, :n])
    A = torch.cat(As).view(-1, bank.rank, As[0].size(1))
    if bank.even and Bs[0].element_size() > 2:
        B_T = torch.cat(Bs).view(-1, out, bank.rank).mT
    else:
        B_T = torch.cat([B.t() for B in Bs]).view(-1, bank.rank, out)
    # Cast as a stack: that is one launch for any number of adapters.
    if B_T.dtype != dtype:
        B_T = B_T.to(dtype, memory_format=torch.contiguous_format)
    return cast(A, dtype), B_T
