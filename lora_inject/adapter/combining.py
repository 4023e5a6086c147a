"""Combine several adapters into one: exact sums, and the published lossy methods.

Source of the methods on A and B and of their variants with `_svd`: peft 0.21.2,
`LoraModel.add_weighted_adapter` and utils/merge_utils.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor

from lora_inject.adapter.algebra import check_finite, gathered
from lora_inject.adapter.state import (
    AdapterState,
    SiteState,
    cut_down,
    plain,
    weighted_sum,
    with_sites,
)
from lora_inject.adapter.svd import decompose
from lora_inject.errors import StateError, check_type
from lora_inject.spec.sites import SiteSpec

ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = ("cat", "svd", *ON_FACTORS, *(f"{name}_svd" for name in ON_FACTORS[1:]))
"""`cat` and `svd` are exact sums; those of ON_FACTORS work on A and B, with `_svd` on the delta."""

Weighted = Sequence[tuple[SiteState, float]]
Sign = Literal["total", "frequency"]


def combined(
    states: Sequence[AdapterState],
    weights: Sequence[float] | None = None,
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    majority_sign: Sign = "total",
    seed: int = 0,
) -> AdapterState:
    """Combine adapters of one base; see `lora_inject.combine`."""
    asked = f"combine by {method!r}"
    weights = [1.0] * len(states) if weights is None else list(weights)
    check_type(f"{asked}, rank", 1 if rank is None else rank, Integral, "Give 1 or more")
    _check(states, weights, method, rank, density, majority_sign, asked)
    if method in ("cat", "svd"):
        found = weighted_sum(states, weights, asked)
        if method == "cat":
            return found
        sites = {}
        for name, site in found.sites.items():
            there = [state.sites[name].spec.rank for state in states if name in state.sites]
            sites[name] = cut_down(site, rank or max(there), None, asked)[0]
        return replace(found, sites=sites)
    rule = partial(_rule, method.removesuffix("_svd"), density, majority_sign, seed)
    make = partial(_on_delta, rank=rank) if method.endswith("_svd") else _on_factors
    return with_sites(states, weights, partial(make, rule=rule, asked=asked), asked)


def _check(
    states: Sequence[AdapterState],
    weights: Sequence[float],
    method: str,
    rank: int | None,
    density: float | None,
    majority_sign: str,
    asked: str,
) -> None:
    if method not in METHODS:
        raise StateError(asked, "there is no such method", f"Choose one of {', '.join(METHODS)}")
    if not states:
        raise StateError(asked, "no adapter is given", "Give at least one")
    if len(weights) != len(states):
        found = f"there are {len(weights)} weights for {len(states)} adapters"
        raise StateError(asked, found, "Give one for each")
    for weight in weights:
        check_type(f"{asked}, a weight", weight, Real, "Give finite numbers other than 0")
        if not math.isfinite(weight) or weight == 0:
            raise StateError(asked, f"a weight is {weight}", "Give finite numbers other than 0")
    if rank is not None and (rank < 1 or not method.endswith("svd")):
        found = f"rank is {rank}" if rank < 1 else "the method keeps all ranks, and rank is given"
        raise StateError(asked, found, "Give rank=1 or more to svd, or to a method with _svd")
    wants = method not in ("cat", "svd", "linear")
    if wants and (density is None or not 0 < density <= 1):
        found = "density is missing" if density is None else f"density is {density}"
        raise StateError(asked, found, "Give the share of values to keep, in (0, 1]")
    if density is not None and not wants:
        found = "the method keeps all values, and density is given"
        raise StateError(asked, found, "Leave density out")
    if majority_sign not in ("total", "frequency"):
        raise StateError(asked, f"majority_sign is {majority_sign!r}", "Give total or frequency")


# The methods on tensors -------------------------------------------------------------------------


def _rule(
    method: str,
    density: float | None,
    majority_sign: Sign,
    seed: int,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    what: str,
) -> Tensor:
    """Mix tensors of one shape: drop values, elect signs, add."""
    if method in ("ties", "magnitude_prune"):
        tensors = [_largest(tensor, density or 1) for tensor in tensors]
    elif method.startswith("dare"):
        tensors = [
            tensor * kept(tensor.shape, density or 1, f"{seed} {what} {number}") / (density or 1)
            for number, tensor in enumerate(tensors)
        ]
    stack = torch.stack(list(tensors))
    mix = torch.tensor(weights, dtype=stack.dtype).view(-1, *[1] * tensors[0].ndim)
    if "ties" not in method:
        return (stack * mix).sum(0)
    elected = stack.sum(0) if majority_sign == "total" else stack.sign().sum(0)
    agree = stack.sign() == torch.where(elected >= 0, 1, -1)
    return (stack * mix * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """Keep a share of the values, the largest (TIES, arXiv:2306.01708, section 4.1)."""
    flat = tensor.flatten()
    keep = torch.zeros_like(flat)
    keep[flat.abs().topk(int(density * flat.numel())).indices] = 1
    return tensor * keep.view(tensor.shape)


def kept(shape: Sequence[int], density: float, what: str) -> Tensor:
    """Return DARE's mask of 1 and 0 (arXiv:2311.03099), random with the text as its seed."""
    digest = hashlib.blake2b(what.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64).lt(density).double()


def _on_factors(
    there: Weighted, like: SiteSpec, *, rule: Callable[..., Tensor], asked: str
) -> SiteState:
    """Mix the A and mix the B, each weighted by the root of weight times scale."""
    asked = f"{asked}, site '{like.name}'"
    first = there[0][0].spec
    for site, _ in there:
        check_finite(plain(site, asked), asked)
        spec = site.spec
        if (spec.rank, spec.slices) != (first.rank, first.slices) or len(site.pairs) > 1:
            found = f"its ranks are {first.rank} and {spec.rank}"
            if spec.rank == first.rank:
                found = "they have different slices, or one has a frozen start"
            raise StateError(asked, found, "Use cat, svd, or a method with _svd")
    factors = [weight * site.spec.scale for site, weight in there]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    dtype = reduce(torch.promote_types, (site.A.dtype for site, _ in there))
    A = rule([site.A.detach().cpu().double() for site, _ in there], signed, f"{like.name} A")
    B = rule([site.B.detach().cpu().double() for site, _ in there], roots, f"{like.name} B")
    of = {"rank": first.rank, "slices": first.slices, "alpha": float(first.rank)}
    return SiteState(_new(like, of), A.to(dtype), B.to(dtype))


def _on_delta(
    there: Weighted,
    like: SiteSpec,
    *,
    rule: Callable[..., Tensor],
    asked: str,
    rank: int | None,
) -> SiteState:
    """Mix the dense deltas of one site, and return the best approximation of low rank."""
    for site, _ in there:
        check_finite(plain(site, asked), f"{asked}, site '{like.name}'")
    most = rank or max(site.spec.rank for site, _ in there)
    wide = all(site.A.dtype == torch.float64 for site, _ in there)
    deltas = [_dense(site, torch.float64 if wide else torch.float32) for site, _ in there]
    mix = rule(deltas, [weight for _, weight in there], f"{like.name} W")
    halves = [decompose(matrix.to(deltas[0].dtype), most) for matrix in mix]
    most = max(len(half.S) for half in halves)
    dtype = reduce(torch.promote_types, (site.A.dtype for site, _ in there))
    A = torch.stack([(half.V * half.S.sqrt()).T for half in halves]).to(dtype)
    B = torch.stack([half.U * half.S.sqrt() for half in halves]).to(dtype)
    spec = _new(like, {"rank": most, "slices": None, "alpha": float(most)})
    return SiteState(spec, A.reshape(spec.a_shape), B.reshape(spec.b_shape))


def _dense(site: SiteState, dtype: torch.dtype) -> Tensor:
    """The delta of a site, `(experts, out, in)`."""
    spec = site.spec
    delta = torch.zeros(spec.experts or 1, spec.out_features, spec.in_features, dtype=dtype)
    for (start, stop), left, right in gathered([(site, 1.0)]):
        delta[:, start:stop] = left.cpu().to(dtype) @ right.cpu().to(dtype)
    return delta


def _new(like: SiteSpec, of: Mapping[str, object]) -> SiteSpec:
    return replace(like, **of, scaling="standard", init="kaiming", rule=None, aliases=())  # type: ignore[arg-type]
