"""Adapters in the form of most programs: for each module a plain pair of matrices and a scale.

Slices become block-diagonal, frozen starts further ranks. For programs with one rank and one scale,
scales are folded into B and ranks padded with zeros. Deltas do not change.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from lora_inject.adapter.state import AdapterState, SiteState
from lora_inject.errors import FormatError
from lora_inject.formats.checks import FLOATS, check_site
from lora_inject.formats.metadata import one_line
from lora_inject.formats.peft.tensor_layout import file_alpha, file_rank, plain_pair
from lora_inject.functional import all_finite
from lora_inject.spec.sites import SiteSpec

T = TypeVar("T")

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
"""Dtypes that writers accept, by name."""
_DAMAGED = "The file is damaged or was edited; fetch it again"


def plain_sites(
    state: AdapterState, asked: str, *, kinds: Collection[str], client: str
) -> dict[str, SiteState]:
    """Return an adapter's sites without slices and frozen starts, with the same deltas.

    Other kinds than `kinds`, trained tensors and further tensors of variants are refused.
    """
    if state.trained:
        raise FormatError(
            asked,
            f"{client} cannot hold trained tensors, such as {one_line(state.trained)}",
            "Merge the adapter into its base (lora-inject merge), or train without `train`",
        )
    sites = {}
    for name, site in state.sites.items():
        check_site(site, asked)
        if site.spec.kind not in kinds:
            raise FormatError(
                f"{asked}, site '{name}'",
                f"{client} cannot hold a site of kind '{site.spec.kind}'",
                f"Merge the adapter into its base (lora-inject merge); kinds: {', '.join(kinds)}",
            )
        if site.further:
            raise FormatError(
                f"{asked}, site '{name}'",
                f"{client} cannot hold {one_line(site.further)} of the variant "
                f"'{site.spec.variant}'",
                "Merge the adapter into its base (lora-inject merge)",
            )
        sites[name] = _plain(site)
    if not sites:
        raise FormatError(asked, "it has no sites", f"Give sites: {client} holds nothing else")
    return sites


def _plain(site: SiteState) -> SiteState:
    spec, derived = site.spec, site.A0 is not None
    if spec.slices is None and not derived:
        return site
    rank, rslora = file_rank(spec, derived=derived), spec.scaling == "rslora"
    alpha = file_alpha(spec, derived=derived, rslora=rslora)
    spec = dataclasses.replace(spec, rank=rank, alpha=alpha, slices=None)
    a, b = plain_pair(site)
    return SiteState(spec, a.reshape(spec.a_shape), b.reshape(spec.b_shape))


def uniform(
    sites: Mapping[str, SiteState],
    asked: str,
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, SiteState]:
    """Return plain sites with one rank and scale 1: scales go into B, missing ranks are zeros.

    B is multiplied in float32 at least and rounded once. `rank` defaults to the largest.
    """
    largest = max(site.spec.rank for site in sites.values())
    if rank is not None and rank < largest:
        remedy = "Give no rank, or truncate the adapter first (lora-inject truncate)"
        raise FormatError(asked, f"rank {rank} is asked for, and a site has rank {largest}", remedy)
    wanted = rank or largest
    return {name: _changed(site, wanted, wanted, dtype) for name, site in sites.items()}


def one_rank_and_scale(sites: Mapping[str, SiteState], asked: str) -> dict[str, SiteState]:
    """Return plain sites with one rank and one scale, unchanged if they already agree."""
    same = len({(site.spec.rank, site.scale) for site in sites.values()}) == 1
    return dict(sites) if same else uniform(sites, asked)


def with_scale_one(
    sites: Mapping[str, SiteState], *, dtype: torch.dtype | None = None
) -> dict[str, SiteState]:
    """Return plain sites with their own ranks and scale 1; scales are folded into B."""
    return {n: _changed(s, s.spec.rank, s.spec.rank, dtype) for n, s in sites.items()}


def with_one_alpha(sites: Mapping[str, SiteState]) -> dict[str, SiteState]:
    """Return plain sites with their own ranks and one alpha, unchanged if they already agree."""
    alphas = {site.scale * site.spec.rank for site in sites.values()}
    if len(alphas) == 1:
        return dict(sites)
    alpha = max(site.spec.rank for site in sites.values())
    return {name: _changed(site, site.spec.rank, alpha, None) for name, site in sites.items()}


def _changed(site: SiteState, rank: int, alpha: float, dtype: torch.dtype | None) -> SiteState:
    """Return a site with another rank and alpha, and the same delta."""
    spec = dataclasses.replace(
        site.spec, rank=rank, alpha=float(alpha), scaling="standard", dropout=0.0
    )
    dtype = dtype or site.A.dtype
    a, b = site.A.new_zeros(spec.a_shape, dtype=dtype), site.B.new_zeros(spec.b_shape, dtype=dtype)
    wide = torch.promote_types(site.B.dtype, torch.float32)
    a[..., : site.spec.rank, :] = site.A.detach().to(dtype)
    b[..., : site.spec.rank] = (site.B.detach().to(wide) * (site.scale / spec.scale)).to(dtype)
    return SiteState(spec, a, b)


def in_dtype(sites: Mapping[str, SiteState], dtype: str | None, asked: str) -> dict[str, SiteState]:
    """Return sites in a named dtype, by default each tensor's own, checked to be finite."""
    named = dtype_named(dtype, asked)
    cast = {
        name: SiteState(s.spec, s.A.to(named or s.A.dtype), s.B.to(named or s.B.dtype))
        for name, s in sites.items()
    }
    check_finite(cast, asked)
    return cast


def dtype_named(name: str | None, asked: str) -> torch.dtype | None:
    """Return the dtype of a name such as `bfloat16`; None stays None."""
    if name is not None and name not in DTYPES:
        raise FormatError(asked, f"dtype is {name!r}", f"Give one of {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]


def check_finite(sites: Mapping[str, SiteState], asked: str) -> None:
    """Refuse to write NaN and infinity, also those from a cast to a narrower dtype."""
    for name, site in sites.items():
        for role, tensor in site.tensors.items():
            if not all_finite(tensor):
                raise FormatError(
                    f"{asked}, site '{name}'",
                    f"{role} has values that are not finite in {tensor.dtype}",
                    "Look at it with `lora-inject inspect`; use a wider dtype if it is "
                    "finite there",
                )


def plain_site(
    name: str, a: Tensor, b: Tensor, alpha: float, where: str, *, embedding: bool = False
) -> SiteState:
    """Return the site of a foreign pair: A `(r, in)` or `(r, in, k, ...)`, B `(out, r)`.

    Unless the kind is given, a linear layer is assumed, or a convolution if A has a kernel; loading
    onto a model replaces the assumption by the kind of the model's layer.
    """
    check_shapes(a, b, where)
    if not 0 < alpha < math.inf:
        raise FormatError(where, f"its alpha is {alpha}", _DAMAGED)
    rank, n_in, n_out = int(a.shape[0]), a[0].numel(), int(b.shape[0])
    kind, shape = ("conv", (n_out, *a.shape[1:])) if a.ndim > 2 else ("linear", (n_out, n_in))
    if embedding:
        kind, shape = "embedding", (n_in, n_out)
    weight = f"{name}.weight"
    spec = SiteSpec(
        name, kind, n_in, n_out, shape, rank, float(alpha), transposed=embedding, weight=weight
    )
    site = SiteState(spec, a.reshape(spec.a_shape), b.reshape(spec.b_shape))
    check_site(site, where)
    return site


def check_shapes(a: Tensor, b: Tensor, where: str) -> None:
    """Refuse what is not A `(rank, in, ...)` and B `(out, rank, 1, ...)`."""
    found = f"A has shape {tuple(a.shape)} and B {tuple(b.shape)}"
    if not (a.numel() and b.numel()) or not 2 <= a.ndim <= 5 or a.ndim != b.ndim:
        raise FormatError(where, f"{found}, which is not a low-rank pair", _DAMAGED)
    if any(size != 1 for size in b.shape[2:]):
        raise FormatError(where, f"{found}, and a kernel in B is not supported", _DAMAGED)
    if a.shape[0] != b.shape[1]:
        groups = a.ndim > 2 and a.shape[0] % b.shape[1] == 0
        remedy = "PEFT's grouped convolutions have no dense delta; they cannot be read"
        raise FormatError(where, f"{found}: the ranks differ", remedy if groups else _DAMAGED)


def pairs_of(
    parts: Mapping[str, Mapping[str, Tensor]], a: str, b: str, asked: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, dict[str, Tensor]]]:
    """Return complete pairs by module, and the other tensors of each module.

    `parts` are a file's tensors by module and by role, `a` and `b` the roles of a pair.
    """
    pairs, others = {}, {}
    for module, found in parts.items():
        for role in (a, b):
            if role not in found:
                raise FormatError(f"{asked}, '{module[:200]}'", f"its {role} is missing", _DAMAGED)
        pairs[module] = found[a], found[b]
        others[module] = {role: t for role, t in found.items() if role not in (a, b)}
    if not pairs:
        raise FormatError(asked, "it holds no pair of matrices", "Check the path")
    return pairs, others


def matrices(
    tensors: Mapping[str, Tensor], ends: tuple[str, str], asked: str, remedy: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the pairs of a file that may hold nothing else, by the keys without their ends.

    `remedy` is the one for another tensor.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        end = next((end for end in ends if key.endswith(end)), None)
        if end is None or tensor.ndim != 2:
            found = f"'{key[:200]}' of shape {tuple(tensor.shape)} is not a matrix of a pair"
            raise FormatError(asked, found, remedy)
        parts.setdefault(key.removesuffix(end), {})[end.strip(".")] = tensor
    return pairs_of(parts, ends[0].strip("."), ends[1].strip("."), asked)[0]


def check_component(component: str | None, known: Collection[str], asked: str) -> None:
    """Refuse to write a file that does not name a part of a pipeline."""
    if component not in known:
        found = "the file has to name the part of a pipeline that the adapted model is"
        raise FormatError(
            asked,
            found if component is None else f"component is {component!r}",
            f'Pass component="unet", or one of {", ".join(known)}',
        )


def one_component(found: Mapping[str, T], component: str | None, asked: str) -> T:
    """Return the given component, or the only one in a file."""
    if component is None and len(found) == 1:
        return next(iter(found.values()))
    if component is None or component not in found:
        raise FormatError(
            asked,
            f"it holds {one_line(found)}" + (f", not '{component}'" if component else ""),
            "Name the one to read, each onto its own model: "
            f'component="{next(iter(found), "unet")}" (--component)',
        )
    return found[component]


def alpha_of(alpha: Tensor | None, rank: int, where: str) -> float:
    """Return the alpha in a scalar tensor; without one the rank, for a scale of 1."""
    if alpha is None:
        return float(rank)
    if alpha.numel() != 1 or alpha.ndim > 1:
        raise FormatError(where, f"its alpha has shape {tuple(alpha.shape)}", _DAMAGED)
    return float(alpha)
