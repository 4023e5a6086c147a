"""Sums of the updates of one site, on their thin factors.

No dense delta is formed. An update has one part for each adapted span of the output,
`left @ right`, of shapes `(experts, width, k)` and `(experts, k, in)`, with the scale in `left`.
Sites with the same slices are added slice by slice, other sites over the whole output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.spec.sites import SiteSpec, Slices, adapted_parts, fits_kernel
from lora_inject.errors import StateError

_SAME = 1e-12  # relative difference of two equal scales alpha / rank by rounding

Term = tuple[SiteState, float]
Parts = list[tuple[tuple[int, int], Tensor, Tensor]]


def check_alike(specs: Sequence[SiteSpec], names: Sequence[str], asked: str) -> None:
    """Refuse sites, which messages call by `names`, of other features, kernels or orientation."""
    one = specs[0]
    for two, name in zip(specs[1:], names[1:], strict=True):
        maps = [
            (s.in_features, s.out_features, s.experts, s.kind == "parameter" and s.transposed)
            for s in (one, two)
        ]
        if maps[0] != maps[1]:
            shapes = [f"{m[0]} to {m[1]}" + f" ({m[2]} experts)" * bool(m[2]) for m in maps]
            problem = f"{names[0]} maps {shapes[0]} features and {name} {shapes[1]}"
            if shapes[0] == shapes[1]:
                layouts = ["(in, out)" if m[3] else "(out, in)" for m in maps]
                problem = f"the weight is {layouts[0]} in {names[0]} and {layouts[1]} in {name}"
        elif fits_kernel(one, two.weight_shape) and fits_kernel(two, one.weight_shape):
            continue
        else:
            shapes = [str(spec.weight_shape) for spec in (one, two)]
            problem = f"the weight is {shapes[0]} in {names[0]} and {shapes[1]} in {name}"
        raise StateError(f"{asked}, site '{one.name}'", problem, "Give adapters of one base")


_Contribution = tuple[tuple[int, int], Tensor, Tensor, float]


def _contributions(term: Term, unit: float) -> Iterator[_Contribution]:
    """Yield `(span, A (experts, r, in), B (experts, width, r), factor)` of each part and pair."""
    site, weight = term
    spec = site.spec
    for A, B, sign in site.pairs:
        factor = weight * sign * spec.scale / unit
        if math.isclose(abs(factor), 1, rel_tol=_SAME):
            factor = math.copysign(1, factor)
        a = A.detach().reshape(spec.experts or 1, -1, spec.in_features)
        b = B.detach().reshape(spec.experts or 1, -1, spec.rank)
        for part in adapted_parts(spec.spans, spec.rank):
            yield (part.start, part.stop), a[:, part.a], b[:, part.b], factor


def _common(specs: Sequence[SiteSpec]) -> Slices | None:
    """Return the slices that cover what several sites adapt; None for the whole output."""
    sizes = {spec.slices.sizes if spec.slices else () for spec in specs}
    if len(sizes) > 1 or () in sizes:
        return None
    named = {name for spec in specs if spec.slices for name in spec.slices.adapt}
    all_parts = sizes.pop()
    return Slices(all_parts, tuple(name for name, _ in all_parts if name in named))


def gathered(terms: Sequence[Term], dtype: torch.dtype = torch.float64, unit: float = 1.0) -> Parts:
    """Return the parts of `sum of weight * delta / unit`: ranks concatenated, in one dtype.

    They are on the device of the first term, and have the spans that all terms share.
    """
    specs = [site.spec for site, _ in terms]
    like = torch.empty(0, dtype=dtype, device=terms[0][0].A.device)
    slices = _common(specs)
    spans = slices.spans if slices else ((0, specs[0].out_features),)
    rows = [row for term in terms for row in _contributions(term, unit)]
    return [(span, *_part(span, rows, specs[0], like)) for span in spans]


def _part(
    span: tuple[int, int], rows: Sequence[_Contribution], spec: SiteSpec, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return left and right of the contributions inside a span, with all their ranks."""
    start, stop = span
    n = spec.experts or 1
    lefts, rights = [like.new_empty(n, stop - start, 0)], [like.new_empty(n, 0, spec.in_features)]
    for (first, last), a, b, factor in rows:
        if start <= first and last <= stop:
            scaled = b if factor == 1 else b.double() * factor
            padding = (0, 0, first - start, stop - last)
            lefts.append(F.pad(scaled.to(like.device, like.dtype), padding))
            rights.append(a.to(like.device, like.dtype))
    return torch.cat(lefts, 2), torch.cat(rights, 1)


def total(terms: Sequence[Term], like: SiteSpec) -> SiteState:
    """Return `sum of weight * delta` as one site, with all ranks side by side.

    The scale is the largest of the terms'. The B of a term with another scale is multiplied by the
    ratio, in float32 at least. A frozen start becomes further ranks with the opposite sign.
    """
    specs = [site.spec for site, _ in terms]
    pairs = [pair for site, _ in terms for pair in site.pairs]
    dtype = reduce(torch.promote_types, (t.dtype for A, B, _ in pairs for t in (A, B)))
    scales = [abs(weight) * site.scale for site, weight in terms]
    unit = max(scales)
    if not all(math.isclose(scale, unit, rel_tol=_SAME) for scale in scales):
        dtype = torch.promote_types(dtype, torch.float32)
    rslora = all(spec.scaling == "rslora" for spec in specs)
    like = replace(like, slices=_common(specs), scaling="rslora" if rslora else "standard")
    return site_of(gathered(terms, dtype, unit), like, unit, terms)


def site_of(parts: Parts, like: SiteSpec, scale: float, terms: Sequence[Term] = ()) -> SiteState:
    """Build a site from parts, padded with zeros to one rank; biases of B of terms are added."""
    rank = max(left.shape[2] for _, left, _ in parts)
    A = torch.cat([F.pad(right, (0, 0, 0, rank - right.shape[1])) for _, _, right in parts], 1)
    B = torch.cat([F.pad(left, (0, rank - left.shape[2])) for _, left, _ in parts], 1)
    biases = [
        weight * site.scale * site.further["b"].detach().double()
        for site, weight in terms
        if "b" in site.further
    ]
    alpha = scale * (math.sqrt(rank) if like.scaling == "rslora" else rank)
    spec = replace(like, rank=rank, alpha=alpha, init="kaiming", lora_bias=bool(biases))
    tensors = {"A": A.reshape(spec.a_shape), "B": B.reshape(spec.b_shape)}
    if biases:
        tensors["b"] = (torch.stack(biases).sum(0) / scale).to(B.dtype)
    return SiteState.of(spec, tensors)
