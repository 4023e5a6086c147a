"""Combine several adapters into one: exact sums, and the published lossy methods.

Source of the methods on A and B and of their variants with `_svd`: peft 0.21.2,
`LoraModel.add_weighted_adapter` and utils/merge_utils.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor

from lora_inject.algebra.values import called, weighted_sum, with_sites
from lora_inject.core.adapter.parts import MADE, Term, gathered, plain, truncated
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.adapter.svd import decompose
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import StateError, check_type

ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = ("cat", "svd", *ON_FACTORS, *(f"{name}_svd" for name in ON_FACTORS[1:]))
"""`cat` and `svd` are exact sums; those of ON_FACTORS work on A and B, with `_svd` on the delta."""

Sign = Literal["total", "frequency"]


@dataclass(frozen=True)
class Method:
    """A way to combine adapters of one base, with its options; see `lora_inject.combine`."""

    name: str
    rank: int | None
    density: float | None
    majority_sign: Sign
    seed: int

    def __post_init__(self) -> None:
        """Refuse options that are missing, wrong or without effect."""
        if self.name not in METHODS:
            remedy = f"Choose one of {', '.join(METHODS)}"
            raise StateError(self.asked, "there is no such method", remedy)
        if self.rank is not None:
            self._check_rank(self.rank)
        self._check_density()
        if self.majority_sign not in ("total", "frequency"):
            problem = f"majority_sign is {self.majority_sign!r}"
            raise StateError(self.asked, problem, "Give total or frequency")

    def _check_rank(self, rank: int) -> None:
        check_type(f"{self.asked}, rank", rank, Integral, "Give 1 or more")
        remedy = "Give rank=1 or more to svd, or to a method with _svd"
        if rank < 1:
            raise StateError(self.asked, f"rank is {rank}", remedy)
        if not self.name.endswith("svd"):
            raise StateError(self.asked, "the method keeps all ranks, and rank is given", remedy)

    def _check_density(self) -> None:
        """Require a share in (0, 1] where the method drops values, and none where it does not."""
        density, drops = self.density, self.name not in ("cat", "svd", "linear")
        if density is not None:
            check_type(f"{self.asked}, density", density, Real, "Give a share, in (0, 1]")
        if drops and (density is None or not 0 < density <= 1):
            problem = "density is missing" if density is None else f"density is {density}"
            raise StateError(self.asked, problem, "Give the share of values to keep, in (0, 1]")
        if density is not None and not drops:
            problem = "the method keeps all values, and density is given"
            raise StateError(self.asked, problem, "Leave density out")

    @property
    def asked(self) -> str:
        """What messages say was asked for."""
        return f"combine by {self.name!r}"

    def combined(
        self, states: Sequence[AdapterState], weights: Sequence[float] | None
    ) -> AdapterState:
        """Return the sum of the adapters by their weights, by default 1."""
        weights = [1.0] * len(states) if weights is None else list(weights)
        if not states:
            raise StateError(self.asked, "no adapter is given", "Give at least one")
        if len(weights) != len(states):
            problem = f"there are {len(weights)} weights for {len(states)} adapters"
            raise StateError(self.asked, problem, "Give one for each")
        for state, name in zip(states, called(states), strict=True):
            state.check_finite(f"{self.asked}, {name}")
        if self.name not in ("cat", "svd"):
            make = self._on_delta if self.name.endswith("_svd") else self._on_factors
            return with_sites(states, weights, make, self.asked)
        summed = weighted_sum(states, weights, self.asked)
        if self.name == "cat":
            return summed
        sites = {}
        for name, site in summed.sites.items():
            there = [state.sites[name].spec.rank for state in states if name in state.sites]
            sites[name], _ = truncated(site, self.rank or max(there), None, self.asked)
        return replace(summed, sites=sites)

    def _on_factors(self, there: Sequence[Term], like: SiteSpec, names: Sequence[str]) -> SiteState:
        """Mix the A and mix the B, each weighted by the root of weight times scale."""
        first = there[0][0].spec
        for (site, _), name in zip(there, names, strict=True):
            spec = plain(site, f"{self.asked}, {name}").spec
            if (spec.rank, spec.slices) != (first.rank, first.slices) or site.A0 is not None:
                problem = f"{names[0]} has rank {first.rank} and {name} rank {spec.rank}"
                if spec.rank == first.rank:
                    problem = f"{name} has other slices than {names[0]}"
                if site.A0 is not None:
                    problem = f"{name} has a frozen start"
                asked = f"{self.asked}, site '{like.name}'"
                raise StateError(asked, problem, "Use cat, svd, or a method with _svd")
        factors = [weight * site.scale for site, weight in there]
        roots = [math.sqrt(abs(factor)) for factor in factors]
        signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
        A = self._mixed([site.A.detach().cpu().double() for site, _ in there], signed, like, "A")
        B = self._mixed([site.B.detach().cpu().double() for site, _ in there], roots, like, "B")
        return _made(replace(like, slices=first.slices), first.rank, A, B, there)

    def _on_delta(self, there: Sequence[Term], like: SiteSpec, names: Sequence[str]) -> SiteState:
        """Mix the dense deltas of one site, and return the best approximation of low rank."""
        for (site, _), name in zip(there, names, strict=True):
            plain(site, f"{self.asked}, {name}")
        wide = all(site.A.dtype == torch.float64 for site, _ in there)
        dtype = torch.float64 if wide else torch.float32
        deltas = [_dense(site, dtype) for site, _ in there]
        mix = self._mixed(deltas, [weight for _, weight in there], like, "W")
        most = self.rank or max(site.spec.rank for site, _ in there)
        halves = [decompose(matrix.to(dtype), most) for matrix in mix]
        A = torch.stack([(half.V * half.S.sqrt()).T for half in halves])
        B = torch.stack([half.U * half.S.sqrt() for half in halves])
        return _made(replace(like, slices=None), B.shape[-1], A, B, there)

    def _mixed(
        self, tensors: Sequence[Tensor], weights: Sequence[float], like: SiteSpec, what: str
    ) -> Tensor:
        """Mix tensors of one shape: drop values, elect signs, add."""
        method, density = self.name.removesuffix("_svd"), self.density or 1
        if method in ("ties", "magnitude_prune"):
            tensors = [_largest(tensor, density) for tensor in tensors]
        elif method.startswith("dare"):
            name = f"{self.seed} {like.name} {what}"
            masks = [kept(t.shape, density, f"{name} {n}") for n, t in enumerate(tensors)]
            tensors = [t * mask / density for t, mask in zip(tensors, masks, strict=True)]
        stack = torch.stack(list(tensors))
        mix = stack * stack.new_tensor(weights).view(-1, *[1] * tensors[0].ndim)
        if "ties" not in method:
            return mix.sum(0)
        elected = stack.sum(0) if self.majority_sign == "total" else stack.sign().sum(0)
        agree = stack.sign() == torch.where(elected >= 0, 1, -1)
        return (mix * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """Keep a share of the values, the largest (TIES, arXiv:2306.01708, section 4.1)."""
    flat = tensor.flatten()
    keep = torch.zeros_like(flat)
    keep[flat.abs().topk(int(density * flat.numel())).indices] = 1
    return tensor * keep.view(tensor.shape)


def kept(shape: Sequence[int], density: float, what: str) -> Tensor:
    """Return DARE's mask of 1 and 0 (arXiv:2311.03099), random with the text as its seed."""
    digest = hashlib.blake2b(what.encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest) >> 1)
    drawn = torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")
    return drawn.lt(density).double()


def _dense(site: SiteState, dtype: torch.dtype) -> Tensor:
    """The delta of a site, `(experts, out, in)`."""
    spec = site.spec
    shape = spec.experts or 1, spec.out_features, spec.in_features
    delta = torch.zeros(shape, dtype=dtype, device="cpu")
    for (start, stop), left, right in gathered([(site, 1.0)]):
        delta[:, start:stop] = left.cpu().to(dtype) @ right.cpu().to(dtype)
    return delta


def _made(like: SiteSpec, rank: int, A: Tensor, B: Tensor, there: Sequence[Term]) -> SiteState:
    """Return a site with scale 1, in the dtype of those that it was made of."""
    spec = replace(like, rank=rank, alpha=float(rank), scaling="standard", **MADE)
    dtype = reduce(torch.promote_types, (site.A.dtype for site, _ in there))
    return SiteState(spec, A.reshape(spec.a_shape).to(dtype), B.reshape(spec.b_shape).to(dtype))
