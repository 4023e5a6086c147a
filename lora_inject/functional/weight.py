"""The weight with its updates: as a sum that can wait, formed, and as the textbook formula.

A weight and its updates are `base + sum of scale * left @ right`, matrix by matrix over
the weight's own memory (`LowRank`). `effective_weight` carries the sum out, differentiably;
`products` multiplies with it and never does; `dense_delta` is the formula itself, for analysis and
for tests of everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from lora_inject.functional.factors import spread, without_autocast
from lora_inject.functional.gain import Gain, norms_of
from lora_inject.spec.sites import SiteSpec

Update = tuple[SiteSpec, Tensor, Tensor, float]


class LowRank(NamedTuple):
    """A weight and its updates: `base + sum of scale * left @ right`.

    Attributes:
        base: `(..., m, n)`.
        terms: `(left, right, scale)` of each update, `(..., m, R)` and `(..., R, n)`, in float32 or
            wider.
        float32: Whether a product is to keep its low-rank arithmetic in float32 over a 16-bit base.
        gain: The factor on the outputs of the sum, and whether these are its last axis; or None
    """

    base: Tensor
    terms: tuple[tuple[Tensor, Tensor, float], ...]
    float32: bool = False
    gain: tuple[Gain, bool] | None = None

    def formed(self, dtype: torch.dtype) -> Tensor:
        """Carry out the sum, differentiably: `(..., m, n)`, rounded once to `dtype`."""
        wide = torch.promote_types(self.base.dtype, torch.float32)
        add = torch.addmm if self.base.dim() == 2 else torch.baddbmm
        total = self.base.to(wide)
        with without_autocast(total) or nullcontext():
            for left, right, scale in self.terms:
                total = add(total, left.to(wide), right.to(wide), alpha=scale)
            if self.gain is not None:
                gain, transposed = self.gain
                g = gain.of(norms_of(total, transposed)).to(wide)
                total = total * (g if transposed else g[:, None])
        return total.to(dtype)


def low_rank(weight: Tensor, updates: Sequence[Update], gain: Gain | None = None) -> LowRank:
    """Return a weight and its updates as matrices: `(E, m, n)` for stacked experts, else one.

    These are views of the weight, of every A and, where it has no slices, of every B.
    """
    spec = updates[0][0]
    lead = () if spec.experts is None else (spec.experts,)
    terms = []
    for site, A, B, scale in updates:
        right, left = A.reshape(*lead, -1, site.in_features), B.reshape(*lead, -1, site.rank)
        if site.slices is not None:
            left = spread(left, site.spans, site.out_features)
        terms.append((right.mT, left.mT, scale) if site.transposed else (left, right, scale))
    float32 = any(site.compute == "float32" for site, *_ in updates)
    matrix = weight.reshape(*lead, -1, spec.matrix_shape[1])
    return LowRank(matrix, tuple(terms), float32, (gain, spec.transposed) if gain else None)


def effective_weight(
    weight: Tensor, updates: Sequence[Update], *, float32: bool, gain: Gain | None = None
) -> Tensor:
    """Form `W + sum of scale * B @ A`, times its gain, differentiably.

    Args:
        weight: The frozen tensor, any shape that `spec.weight_shape` states.
        updates: `(spec, A, B, scale)` for each update.
        float32: Return float32 instead of rounding to the weight's dtype.
        gain: The factor on the outputs of the sum.

    Returns:
        A new tensor of the weight's shape. Over a 16-bit weight the sum is formed in float32 and
        rounded once.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32) if float32 else weight.dtype
    return low_rank(weight, updates, gain).formed(dtype).reshape(weight.shape)


def dense_delta(spec: SiteSpec, A: Tensor, B: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return `scale * B @ A` in the shape of the weight: the textbook formula.

    Args:
        spec: The site.
        A: `spec.a_shape`.
        B: `spec.b_shape`.
        dtype: Dtype of the arithmetic and of the result.

    Returns:
        Tensor of `spec.weight_shape`; zero outside the adapted slices.

    Examples:
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
