"""Weights whose outputs have a gain: `W' = g (W + delta)`, with g from the norms of `W + delta`.

DoRA's is `m / |W + delta|` (arXiv:2402.09353, eq. 5), for each output over its inputs, and no
gradient flows through the norm (section 4.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_inject.core.functional.factors import Spans, Update, cast, without_autocast
from lora_inject.core.functional.plain_operations import spread
from lora_inject.core.spec.sites import adapted_parts

Formula = Callable[[Mapping[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Gain:
    """The gain of one weight's outputs.

    Attributes:
        formula: Function from rows of the tensors and norms of some outputs to their gains.
        tensors: By role, each with one row for each adapted output.
        spans: `(start, stop)` along the output of each adapted part; other outputs have gain 1.
    """

    formula: Formula
    tensors: Mapping[str, Tensor]
    spans: Spans

    def of(self, norms: Tensor, first: int = 0) -> Tensor:
        """Return the gains `(n,)` of outputs from `first` on, from their norms `(n,)`."""
        pieces, end, last = [], first, first + norms.shape[0]
        for start, stop, _, held in adapted_parts(self.spans, 1):
            a, b = max(start, first), min(stop, last)
            if a < b:
                mine = self.tensors
                if (a, b) != (start, stop) or len(self.spans) > 1:  # a slice has a backward
                    rows = slice(held.start + a - start, held.start + b - start)
                    mine = {role: tensor[rows] for role, tensor in mine.items()}
                pieces += [norms.new_ones(a - end)] if a > end else []
                pieces.append(self.formula(mine, norms[a - first : b - first]))
                end = b
        pieces += [norms.new_ones(last - end)] if last > end else []
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def to(self, dtype: torch.dtype) -> Gain:
        """Return the same gain without gradients, in a dtype."""
        tensors = {role: tensor.detach().to(dtype) for role, tensor in self.tensors.items()}
        return Gain(self.formula, tensors, self.spans)


def norms_of(weight: Tensor, transposed: bool) -> Tensor:
    """Return the norm of each output over its inputs `(out,)`, in float32 or wider.

    `weight` is `(out, in)`, or `(in, out)` where `transposed`.
    """
    dtype, axis = torch.promote_types(weight.dtype, torch.float32), 0 if transposed else 1
    norms: Tensor = torch.linalg.vector_norm(weight.detach(), dim=axis, dtype=dtype)
    return norms


class Sum(NamedTuple):
    """`W + sum of scale * B @ A`, formed, without a graph.

    Attributes:
        total: The sum as W lies, in its dtype.
        left: With as many rows as W; `left @ right` is what was added.
        right: With as many columns as W.
    """

    total: Tensor
    left: Tensor
    right: Tensor


class Gains(NamedTuple):
    """The gains of the outputs of a layer in one forward.

    Attributes:
        of_outputs: `(out,)`, with a graph.
        sum: W with its updates, from which their norms are.
    """

    of_outputs: Tensor
    sum: Sum


def gains_of(weight: Tensor, updates: Sequence[Update], gain: Gain, transposed: bool) -> Gains:
    """Return the gains of the outputs of `W + sum of scale * B @ A`.

    Args:
        weight: W `(out, in)`, or `(in, out)` where `transposed`.
        updates: The updates.
        gain: The gain.
        transposed: Whether outputs are columns of W.
    """
    summed = updated(weight, updates, transposed)
    return Gains(gain.of(norms_of(summed.total, transposed)), summed)


@torch.no_grad()
def updated(weight: Tensor, updates: Sequence[Update], transposed: bool) -> Sum:
    """Return `W + sum of scale * B @ A` as W lies, in its dtype and rounded once.

    The norms are of this sum itself. `|w + d|^2 = |w|^2 + 2 w d + d^2` needs no tensor of W's size,
    and where d nearly cancels w it is rounding: of an output of which 5 % is left nothing was.
    In 16 bits each factor is two terms, its rounded value and what rounding left. So the sum is as
    exact as in float32 and is one operation, without a float32 tensor of W's size.

    Examples:
        >>> W, A, B = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
        >>> summed = updated(W, [Update(A, B, 0.5)], False)
        >>> torch.allclose(summed.total, W + 0.5 * B @ A, atol=1e-5)
        True
    """
    dtype, n_out = weight.dtype, weight.shape[1 if transposed else 0]
    with without_autocast(weight) or nullcontext():
        left = _joined([u.scale * spread(u.B, u.spans, n_out) for u in updates], 1)
        right = _joined([u.A for u in updates], 0)
        if dtype.itemsize < 4:
            (left, left_rest), (right, right_rest) = _halves(left, dtype), _halves(right, dtype)
            left = torch.cat([left, left_rest, left], 1)
            right = torch.cat([right, right, right_rest])
        left, right = cast(left, dtype), cast(right, dtype)
        left, right = (right.t(), left.t()) if transposed else (left, right)
        return Sum(torch.addmm(weight, left, right), left, right)


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _halves(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a tensor rounded to 16 bits, and what that left of it."""
    rounded = t.to(dtype)
    return rounded, (t - rounded).to(dtype)


def gained(y: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Return `g (y - b) + b` as `g y + (1 - g) b`: y itself where g is 1."""
    if bias is None:
        return y * gain.to(y.dtype)
    return torch.addcmul(((1 - gain) * bias).to(y.dtype), y, gain.to(y.dtype))
