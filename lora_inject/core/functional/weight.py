"""A weight with its updates: products with the sum, the sum itself, and the textbook formula.

A weight and its updates are `base + sum of scale * left @ right`, matrix by matrix over the
weight's own memory. `x (W + s L R) = x W + s (x L) R`: the second product and its gradients are as
thin as the rank, and neither forward nor backward creates a tensor of the weight's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.core.functional.factors import (
    Patch,
    Update,
    compute_dtype,
    without_autocast,
)
from lora_inject.core.functional.gain import Gain, norms_of
from lora_inject.core.functional.linear import linear
from lora_inject.core.functional.plain_operations import add_thin, embedding, spread
from lora_inject.core.spec.sites import SiteSpec


class LowRank(NamedTuple):
    """A weight and its updates: `base + sum of scale * left @ right`."""

    base: Tensor  # `(..., m, n)`
    # `(left, right, scale)` of each: `(..., m, R)` and `(..., R, n)`, in float32 or wider
    terms: tuple[tuple[Tensor, Tensor, float], ...]
    float32: bool  # whether products keep their low-rank arithmetic in float32
    # the factor on the outputs of the sum, and whether these are its last axis
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

    def turned(self) -> LowRank:
        """Return the transposed matrices, which have no gain."""
        terms = tuple((right.mT, left.mT, scale) for left, right, scale in self.terms)
        return LowRank(self.base.mT, terms, self.float32)

    def detached(self) -> LowRank:
        """Return the same without a graph."""
        terms = tuple((left.detach(), right.detach(), scale) for left, right, scale in self.terms)
        return LowRank(self.base.detach(), terms, self.float32)

    def at(self, index: int | Tensor) -> LowRank:
        """Return one or some matrices of a stack, which has no gain."""
        terms = tuple((left[index], right[index], scale) for left, right, scale in self.terms)
        return LowRank(self.base[index], terms, self.float32)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `x @ self + bias`, as `torch.matmul` gives it; a bias is for one matrix only."""
        if self.base.dim() == 2:
            in_out = not self.base.mT.is_contiguous()
            weight = self.base if in_out else self.base.mT
            factors = self._factors()
            return linear(x, weight, bias, factors, transposed=in_out, float32=self.float32)
        return self._added(torch.matmul(x, self.base), x)

    def times(self, x: Tensor) -> Tensor:
        """Return `self @ x`; of a stack in this order, on which the bits of its base depend."""
        if self.base.dim() == 2:
            return self.turned().product(x.mT).mT.contiguous()
        return self._added(torch.matmul(self.base, x), x, in_front=True)

    def _added(self, y: Tensor, x: Tensor, *, in_front: bool = False) -> Tensor:
        with without_autocast(y) or nullcontext():
            for left, right, scale in self.terms:
                y = add_thin(y, x, left, right, scale, float32=self.float32, in_front=in_front)
        return y

    def grouped(self, multiply: Callable[..., Tensor], x: Tensor, offs: Tensor) -> Tensor:
        """Return the product of groups of rows, each with a matrix of its own.

        `multiply` is called as `torch._grouped_mm` is: x `(rows, m)`, sorted by group, a stack of
        matrices, and the end of each group. Rows behind the last are what it leaves there.
        """

        def of_groups(rows: Tensor, factor: Tensor) -> Tensor:
            is_one = len(factor) > 1 and factor.stride(0) == 0  # that all groups share
            return torch.matmul(rows, factor[0]) if is_one else multiply(rows, factor, offs=offs)

        y = multiply(x, self.base, offs=offs)
        for left, right, scale in self.terms:
            # The kernels need rows of a multiple of 16 bytes, which a small rank does not give.
            itemsize = compute_dtype(y.dtype, self.float32).itemsize
            missing = -left.shape[-1] % max(1, 16 // itemsize)
            factors = _padded(left, (0, missing)), _padded(right, (0, 0, 0, missing))
            with without_autocast(y) or nullcontext():
                y = add_thin(y, x, *factors, scale, float32=self.float32, multiply=of_groups)
        return y

    def looked_up(self, ids: Tensor, padding_idx: int | None) -> Tensor:
        """Return `F.embedding(ids, self, padding_idx)`."""
        rows = F.embedding(ids, self.base, padding_idx)
        padding_idx = None if padding_idx is None else padding_idx % len(self.base)
        return embedding(rows, ids, self._factors(), padding_idx, float32=self.float32)

    def _factors(self) -> list[Update]:
        return [Update(left.mT, right.mT, scale) for left, right, scale in self.terms]


def _padded(stack: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Return a stack with zeros at its end; a matrix that all share is padded once."""
    if not any(padding):
        return stack
    is_one = len(stack) > 1 and stack.stride(0) == 0
    return F.pad(stack[:1], padding).expand(len(stack), -1, -1) if is_one else F.pad(stack, padding)


def low_rank(weight: Tensor, patches: Sequence[Patch], gain: Gain | None = None) -> LowRank:
    """Return a weight and its updates as matrices: `(E, m, n)` for stacked experts, else one.

    These are views of the weight, of every A and, where it has no slices, of every B.
    """
    if not patches:  # read as it is, and those who read are noted
        return LowRank(weight, (), float32=False)
    spec = patches[0].spec
    lead: tuple[int, ...] = ()
    if spec.experts is not None:  # of which this process may hold a part
        lead = (len(weight) if weight.dim() == 3 else spec.experts,)
    terms = []
    for patch in patches:
        site = patch.spec
        scale = site.scale * patch.weight
        right, left = (of_every_expert(t, site, *lead) if lead else t for t in (patch.A, patch.B))
        if site.slices is not None:
            left = spread(left, site.spans, site.out_features)
        terms.append((right.mT, left.mT, scale) if site.transposed else (left, right, scale))
    float32 = any(patch.spec.compute == "float32" for patch in patches)
    is_matrix = weight.dim() == len(lead) + 2  # a packed one stays packed
    matrix = weight if is_matrix else weight.reshape(*lead, -1, spec.matrix_shape[1])
    return LowRank(matrix, tuple(terms), float32, (gain, spec.transposed) if gain else None)


def of_every_expert(factor: Tensor, site: SiteSpec, n: int) -> Tensor:
    """Return A or B of a stack for n experts: a shared one as views, zeros of those left out."""
    numbers = site.only
    if numbers is None:
        return factor if len(factor) == n else factor.expand(n, -1, -1)
    zeros = factor.new_zeros(()).expand(n, *factor.shape[1:])
    parts = []
    for matrix, before, number in zip(
        torch.split(factor, 1), (-1, *numbers), numbers, strict=False
    ):
        parts += [zeros[: number - before - 1], matrix]
    return torch.cat([*parts, zeros[numbers[-1] + 1 :]])
