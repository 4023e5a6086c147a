"""The weight with its updates: formed where a model reads it, and as the textbook formula.

One idea: `effective_weight` is the differentiable form, one batched product over the weight's own
memory; `dense_delta` is the formula itself, for analysis and for tests of everything else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_inject.functional.factors import spread
from lora_inject.sites import SiteSpec

__all__ = ["dense_delta", "effective_weight"]


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
        B3 = spread(B3, spec.spans, spec.out_features)
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
