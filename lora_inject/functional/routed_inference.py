"""A routed batch without gradients, in whichever way reads and multiplies least.

How many tokens a row has decides. One, as in decoding: a product with all adapters one
below the other, no matter of what rank, and a mask; each is read once, however many rows have it.
A few, or very many adapters: batched products with a copy for each row. What these two need is
gathered once, for many forwards. Many tokens: row by row, with the adapters as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lora_inject.functional.factors import Factors, without_autocast
from lora_inject.functional.routed import added, one_pair, padded

# Rows for each adapter, and adapters, from where to where a product with all adapters pays: with
# fewer rows it reads nearly as much as copies are; with more adapters it multiplies too much.
SHARED_ROWS, SHARED_ADAPTERS = 2, 16

# Tokens of a row from which two calls for each row are nothing beside their products. On an
# accelerator they never are.
MANY_TOKENS = 32

_Pair = tuple[Tensor, Tensor, float]


class Rows:
    """Which adapter each row of a batch has, for all layers that have the same adapters.

    Args:
        places: For each row 0 for the base, else 1 + the index of its adapter.
        device: Where the batch is.
    """

    def __init__(self, places: Sequence[int], device: torch.device) -> None:
        self.places = tuple(places)
        self.device = device
        self._others: dict[tuple[int, ...], Tensor] = {}

    @cached_property
    def index(self) -> Tensor:
        """The places, `(batch,)`, int64."""
        with torch.inference_mode(False):  # a backward may need it, whoever asks first
            return torch.tensor(self.places, device=self.device)

    def others(self, ranks: tuple[int, ...]) -> Tensor:
        """Return which of all adapters' rows are not of the row's own, `(sum(ranks), batch)`."""
        found = self._others.get(ranks)
        if found is None:
            each = torch.tensor(ranks, device=self.device)
            owners = torch.arange(1, len(ranks) + 1, device=self.device).repeat_interleave(each)
            found = self._others[ranks] = owners[:, None] != self.index
        return found


class Gathered(NamedTuple):
    """What one layer needs of a routed batch.

    Attributes:
        A: `(S, in)`, all adapters one below the other; or `(batch, R, in)`, a copy for each row.
        B: `(S, out)` or `(batch, R, out)`; scale included.
        others: `(S, batch)`, bool: not of the row's own adapter; None where rows have copies.
    """

    A: Tensor
    B: Tensor
    others: Tensor | None = None

    def add(self, y: Tensor, x: Tensor, *, in_place: bool = False) -> Tensor:
        """Add to each row the update of its own adapter.

        Args:
            y: `(batch, ..., out)`.
            x: `(batch, ..., in)`, of as many tokens as were gathered for.
            in_place: Whether y may be modified: nobody else has it.

        Returns:
            `(batch, ..., out)`, in the dtype of `y`.
        """
        context = without_autocast(y)
        if context is None:
            return self._add(y, x, in_place)
        with context:
            return self._add(y, x, in_place)

    def _add(self, y: Tensor, x: Tensor, in_place: bool) -> Tensor:
        A, B, others = self
        batch = x.shape[0]
        # As in `linear`, thin products have the rank as rows.
        if others is None:
            x3 = x.reshape(batch, -1, x.shape[-1]).to(A.dtype)
            h = torch.bmm(A, x3.transpose(1, 2)).transpose(1, 2)
            return added(y.reshape(batch, -1, y.shape[-1]), h, B, in_place).view(y.shape)
        x2 = x.reshape(batch, -1)
        h = torch.mm(A, (x2 if x2.dtype == A.dtype else x2.to(A.dtype)).t())
        h = h.masked_fill_(others, 0).t()
        if y.dtype != h.dtype:
            return torch.addmm(y.reshape(batch, -1).to(h.dtype), h, B).to(y.dtype).view(y.shape)
        if in_place and y.is_contiguous():
            y.view(batch, -1).addmm_(h, B)
            return y
        return torch.addmm(y.reshape(batch, -1), h, B).view(y.shape)


def gather(
    rows: Rows,
    adapters: Sequence[Sequence[Factors]],
    out: int,
    dtype: torch.dtype,
    *,
    one_token: bool = False,
) -> Gathered:
    """Gather the factors of a routed batch.

    Args:
        rows: Which adapter each row has.
        adapters: The updates of each adapter, without dropout.
        out: Width of the output.
        dtype: What to compute in.
        one_token: Whether each row has a single token.

    Example:
        >>> A, B = torch.randn(2, 4), torch.randn(6, 2)
        >>> y, x = torch.zeros(2, 1, 6), torch.randn(2, 1, 4)
        >>> rows = Rows([1, 0], y.device)
        >>> found = gather(rows, [[Factors(A, B, 0.5)]], 6, torch.float32).add(y, x)
        >>> torch.allclose(found[0], 0.5 * x[0] @ A.T @ B.T, atol=1e-6), bool(found[1].any())
        (True, False)
    """
    pairs = [one_pair(updates, out, dtype) for updates in adapters]
    ranks = tuple(A.shape[0] for A, _, _ in pairs)
    rank = max(ranks)
    most = rank * min(SHARED_ADAPTERS, len(rows.places) // SHARED_ROWS)
    if one_token and sum(ranks) <= most:
        As, Bs, scales = zip(*pairs, strict=True)
        B = _scaled_(torch.cat([B.t() for B in Bs]), scales, ranks)
        if bool(B.sum().isfinite()):  # else a broken adapter would spoil every row, by 0 * NaN
            return Gathered(torch.cat(As), B, rows.others(ranks))
    return _copies(rows, pairs, rank)


def _scaled_(B: Tensor, scales: Sequence[float], lengths: Sequence[int]) -> Tensor:
    """Multiply so many rows of B by each scale, in place."""
    if len(set(scales)) == 1:
        return B.mul_(scales[0])
    for rows, scale in zip(torch.split(B, list(lengths)), scales, strict=True):
        rows.mul_(scale)
    return B


def _copies(rows: Rows, pairs: Sequence[_Pair], rank: int) -> Gathered:
    As, Bs = zip(*(padded(A, B, rank) for A, B, _ in pairs), strict=True)
    scales = [scale for _, _, scale in pairs]
    places = rows.index - 1
    if 0 in rows.places:  # zeros behind the last adapter stand for none
        As, Bs = (*As, torch.zeros_like(As[0])), (*Bs, torch.zeros_like(Bs[0]))
        scales.append(1.0)
        places %= len(As)
    A = torch.stack(As)
    B = _scaled_(torch.stack([B.t() for B in Bs]), scales, [1] * len(scales))
    if rows.places == tuple(range(1, len(As) + 1)):
        return Gathered(A, B)
    return Gathered(A.index_select(0, places), B.index_select(0, places))


def are_many_tokens(x: Tensor) -> bool:
    """Whether rows of `x (batch, ..., in)` have so many tokens that nothing is to be gathered."""
    return x.device.type == "cpu" and x.numel() >= MANY_TOKENS * x.shape[0] * x.shape[-1]


def add_row_by_row(
    y: Tensor,
    x: Tensor,
    rows: Rows,
    adapters: Sequence[Sequence[Factors]],
    dtype: torch.dtype,
    *,
    in_place: bool = False,
) -> Tensor:
    """Add to each row of a batch the update of its own adapter, one row after the other.

    Args:
        y: `(batch, ..., out)`.
        x: `(batch, ..., in)`.
        rows: Which adapter each row has.
        adapters: The updates of each adapter, without dropout.
        dtype: What to compute in.
        in_place: Whether y may be modified: nobody else has it.

    Returns:
        `(batch, ..., out)`, in the dtype of `y`. Rows of the base keep their bits.
    """
    with without_autocast(y) or nullcontext():
        if not (in_place and y.is_contiguous()):
            y = y.clone(memory_format=torch.contiguous_format)
        pairs = [one_pair(updates, y.shape[-1], dtype) for updates in adapters]
        factors = [(A, B.t(), scale) for A, B, scale in pairs]
        turned = x.reshape(len(x), -1, x.shape[-1]).to(dtype).transpose(1, 2).unbind()
        each = y.view(len(y), -1, y.shape[-1]).unbind()
        for place, xt, y2 in zip(rows.places, turned, each, strict=True):
            if place:
                A, Bt, scale = factors[place - 1]
                h = torch.mm(A, xt).t()
                if y2.dtype == dtype:
                    y2.addmm_(h, Bt, alpha=scale)
                else:
                    y2.copy_(torch.addmm(y2.to(dtype), h, Bt, alpha=scale))
        return y
