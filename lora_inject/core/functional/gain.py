"""Weights whose outputs have a gain: `W' = g (W + delta)`, with g from the norms of `W + delta`.

DoRA's is `m / |W + delta|` (arXiv:2402.09353, eq. 5), for each output over its inputs, and no
gradient flows through the norm (section 4.3). A forward update does not form `W + delta`:
it multiplies the output, and computes the norms from W and thin products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_inject.core.functional.factors import Spans, Update, without_autocast
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


@torch.no_grad()
def updated_norms(weight: Tensor, updates: Sequence[Update], transposed: bool) -> Tensor:
    """Return the norms of `W + sum of scale * B @ A` by thin products, without forming it.

    `|w + d|^2 = |w|^2 + 2 w d + d^2` for each output w with update `d = b A`. Where B is zero,
    these are exactly the norms of W. If the update nearly cancels w, the error of the square is
    that of rounding `|w|^2` to float32.

    Examples:
        >>> W, A, B = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
        >>> norms = updated_norms(W, [Update(A, B, 0.5)], False)
        >>> torch.allclose(norms, (W + 0.5 * B @ A).norm(dim=1), atol=1e-5)
        True
    """
    with without_autocast(weight) or nullcontext():
        norms = norms_of(weight, transposed)
        wide = norms.dtype
        right = [u.A.to(wide) for u in updates]
        left = [u.scale * spread(u.B, u.spans, norms.shape[0]).to(wide) for u in updates]
        A, B = (t[0] if len(t) == 1 else torch.cat(t, dim) for dim, t in enumerate((right, left)))
        narrow = A.to(weight.dtype)
        WA = (narrow @ weight).t() if transposed else weight @ narrow.t()
        change = torch.addmm(WA.to(wide), B, A @ A.t(), beta=2).mul(B).sum(1)
        return torch.addcmul(change, norms, norms).clamp(min=0).sqrt()


def gained(y: Tensor, base: Tensor, gain: Tensor) -> Tensor:
    """Return `y + (gain - 1) * base`; the gain multiplies base, y without bias."""
    return torch.addcmul(y, base, (gain - 1).to(y.dtype))
