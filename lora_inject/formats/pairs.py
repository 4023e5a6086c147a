"""Adapters in the form of most programs: for each module a plain pair of matrices and a scale.

Out: slices become block-diagonal matrices, and frozen starts become further ranks. For programs
with one rank and one scale, scales are folded into B and ranks padded with zeros. Deltas do not
change. In: the tensors of a file by module and role, checked, as sites.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.core.adapter.file_keys import one_line
from lora_inject.core.adapter.site_state import FLOATS, SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.strict_json import is_positive
from lora_inject.core.functional.finite import lost_by_cast
from lora_inject.core.functional.plain_operations import spread
from lora_inject.core.spec.sites import FROM_WEIGHT, SiteSpec
from lora_inject.errors import FormatError, within

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
"""Dtypes that writers accept, by name."""
_MERGE = "Merge the adapter into its base (lora-inject merge)"
_DAMAGED = "The file is damaged or was edited; fetch it again"


# From a state ------------------------------------------------------------------------------------


def plain_sites(
    state: AdapterState,
    client: str,
    kinds: Collection[str],
    *,
    dtype: str | None = None,
    one_rank: bool = False,
    alpha: Literal["own", "one", "rank"] = "own",
    rank: int | None = None,
) -> dict[str, SiteState]:
    """Return an adapter's sites as a program reads them, with the same deltas.

    The sites have no slices and no frozen starts. Kinds that are not in `kinds`, trained tensors
    and further tensors of variants are refused. With `one_rank` ranks are padded with zeros to
    `rank`, by default the largest. `alpha` is each site's `own`, `one` for all, or the `rank`, for
    a scale of 1: B is multiplied in float64 and rounded once, to `dtype` or each tensor's own
    dtype. Values that a cast to a narrower dtype makes infinite, or 0, are refused.
    """
    if dtype is not None and dtype not in DTYPES:
        raise FormatError("", f"dtype is {dtype!r}", f"Give one of {', '.join(DTYPES)}")
    refuse_more_than_pairs(state, client, kinds)
    sites = {name: site_in_pairs(site) for name, site in state.sites.items()}
    largest = max(site.spec.rank for site in sites.values())
    if rank is not None and rank < largest:
        remedy = "Give no rank, or truncate the adapter first (lora-inject truncate)"
        raise FormatError("", f"rank {rank} is asked for, and a site has rank {largest}", remedy)
    common = rank or largest if one_rank else None
    numbers = {(common and s.spec.rank, s.scale * s.spec.rank) for s in sites.values()}
    agreed = None if len(numbers) == 1 else float(largest)
    changed = {}
    for name, site in sites.items():
        new_rank = common or site.spec.rank
        new_alpha = {"own": None, "one": agreed, "rank": float(new_rank)}[alpha]
        changed[name] = _changed(site, new_rank, new_alpha, DTYPES.get(dtype or ""))
    return changed


def refuse_more_than_pairs(state: AdapterState, client: str, kinds: Collection[str]) -> None:
    """Refuse an adapter that is not pairs of A and B at sites of some kinds, and nothing else.

    Raises:
        FormatError: A client that holds only such pairs cannot hold it.
    """
    if state.trained:
        problem = f"{client} cannot hold trained tensors, such as {one_line(state.trained)}"
        raise FormatError("", problem, f"{_MERGE}, or train without `train`")
    if not state.sites:
        raise FormatError("", "it has no sites", f"Give sites: {client} holds nothing else")
    for name, site in state.sites.items():
        where, spec = f"site '{name}'", site.spec
        if spec.kind not in kinds:
            problem = f"{client} cannot hold a site of kind '{spec.kind}'"
            raise FormatError(where, problem, f"{_MERGE}; kinds: {', '.join(kinds)}")
        if site.further:
            extra = f"{one_line(site.further)} of the variant '{spec.variant}'"
            raise FormatError(where, f"{client} cannot hold {extra}", _MERGE)


def pair_rank(spec: SiteSpec) -> int:
    """Rank of the plain pair: `rank` times the adapted slices, doubled by a frozen start."""
    return spec.rank * len(spec.spans) * (2 if spec.init in FROM_WEIGHT else 1)


def pair_alpha(spec: SiteSpec, *, rslora: bool) -> float:
    """The alpha that gives the plain pair the site's scale.

    It is `scale * rank'`, rank' being the pair's, or `scale * sqrt(rank')` for `use_rslora`.
    """
    rank = pair_rank(spec)
    if rslora == (spec.scaling == "rslora"):  # exact
        factor = rank // spec.rank
        return spec.alpha * (math.sqrt(factor) if rslora else factor)
    return spec.scale * (math.sqrt(rank) if rslora else rank)


def plain_pair(site: SiteState) -> tuple[Tensor, Tensor]:
    """Return A `(experts, r', in)` and B `(experts, out, r')`: no slices, no frozen start."""
    (a, b), *start = [_whole(site.spec, A, B if sign == 1 else -B) for A, B, sign in site.pairs]
    for a0, b0 in start:  # W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]
        a, b = torch.cat([a, a0], dim=1), torch.cat([b, b0], dim=2)
    return a, b


def _whole(spec: SiteSpec, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors over all outputs: `(experts, n * rank, in)`, `(experts, out, n * rank)`."""
    experts = spec.experts or 1
    b = b.detach().reshape(experts, -1, spec.rank)
    b = b if spec.slices is None else spread(b, spec.spans, spec.out_features)
    return a.detach().reshape(experts, -1, spec.in_features), b


def site_in_pairs(site: SiteState) -> SiteState:
    """Return a site without slices and frozen starts."""
    spec = site.spec
    if spec.slices is None and site.A0 is None:
        return site
    rank, alpha = pair_rank(spec), pair_alpha(spec, rslora=spec.scaling == "rslora")
    spec = dataclasses.replace(spec, rank=rank, alpha=alpha, init="kaiming", slices=None)
    a, b = plain_pair(site)
    return SiteState(spec, a.reshape(spec.a_shape), b.reshape(spec.b_shape))


def _changed(
    site: SiteState, rank: int, alpha: float | None, dtype: torch.dtype | None
) -> SiteState:
    """Return a plain site with another rank, alpha and dtype, and the same delta."""
    A, B, spec = site.A.detach(), site.B.detach(), site.spec
    if alpha is None:
        return SiteState(spec, _cast(A, dtype or A.dtype, spec), _cast(B, dtype or B.dtype, spec))
    made = dataclasses.replace(spec, rank=rank, alpha=alpha, scaling="standard", dropout=0.0)
    wide = B.double() * (site.scale / made.scale)
    more = rank - spec.rank
    a = F.pad(_cast(A, dtype or A.dtype, spec), (0, 0, 0, more))
    b = F.pad(_cast(wide, dtype or B.dtype, spec), (0, more))
    return SiteState(made, a, b)


def _cast(tensor: Tensor, dtype: torch.dtype, spec: SiteSpec) -> Tensor:
    made = tensor.to(dtype)
    if lost_by_cast(tensor, made):
        problem = f"its values are not finite in {dtype}, or so small that they become 0"
        raise FormatError(f"site '{spec.name}'", problem, "Give a wider dtype")
    return made


# From a file -------------------------------------------------------------------------------------


def by_module(
    tensors: Mapping[str, Tensor], parsed: Callable[[str], tuple[str, str]]
) -> dict[str, dict[str, Tensor]]:
    """Return a file's tensors by module and role; each module has an `A` and a `B`, all roles once.

    `parsed` gives the module and the role of a key, and refuses a key of another kind.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, role = parsed(key)
        if role in modules.setdefault(module, {}):
            raise FormatError(
                f"'{key[:200]}'", "its site has this tensor a second time", "Fetch it again"
            )
        modules[module][role] = tensor
    for module, parts in modules.items():
        for role in {"A", "B"} - parts.keys():
            raise FormatError(f"site '{module[:200]}'", f"its {role} is missing", _DAMAGED)
    if not modules:
        raise FormatError("", "it holds no pair of matrices", "Check the path")
    return modules


def matrices(
    tensors: Mapping[str, Tensor], ends: tuple[str, str], remedy: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the pairs of a file, which must hold nothing else, by the keys without their ends.

    `ends` are of A and of B; `remedy` is for any other tensor.
    """

    def parsed(key: str) -> tuple[str, str]:
        for role, end in zip("AB", ends, strict=True):
            if key.endswith(end) and tensors[key].ndim == 2:
                return key.removesuffix(end), role
        problem = f"'{key[:200]}' of shape {tuple(tensors[key].shape)} is not a matrix of a pair"
        raise FormatError("", problem, remedy)

    return {name: (of["A"], of["B"]) for name, of in by_module(tensors, parsed).items()}


def plain_site(
    name: str, a: Tensor, b: Tensor, alpha: float | Tensor | None, kind: str = "linear"
) -> SiteState:
    """Return the site of a foreign pair: A `(r, in)` or `(r, in, k, ...)`, B `(out, r)`.

    Without alpha, a number or a scalar tensor, the scale is 1. The kind is `linear`, `conv1d` or
    `embedding`, or that of a convolution if A has a kernel; loading onto a model replaces it by the
    kind of the model's layer.
    """
    with within(f"site '{name[:200]}'"):
        check_shapes(a, b)
        if isinstance(alpha, Tensor) and (alpha.numel() != 1 or alpha.ndim > 1):
            raise FormatError("", f"its alpha has shape {tuple(alpha.shape)}", _DAMAGED)
        number: Any = alpha.item() if isinstance(alpha, Tensor) else alpha
        number = len(a) if number is None else number
        if not is_positive(number):
            raise FormatError("", f"its alpha is {str(number)[:40]}", _DAMAGED)
    rank, n_in, n_out = int(a.shape[0]), a[0].numel(), int(b.shape[0])
    kind, turned = "conv" if a.ndim > 2 else kind, kind != "linear" and a.ndim == 2
    shape = (n_in, n_out) if turned else (n_out, *a.shape[1:])
    spec = SiteSpec(name, kind, n_in, n_out, shape, rank, float(number), transposed=turned)
    return SiteState(spec, a.reshape(spec.a_shape), b.reshape(spec.b_shape))


def check_shapes(a: Tensor, b: Tensor) -> None:
    """Refuse a pair unless A is `(rank, in, ...)` and B is `(out, rank, 1, ...)`."""
    ones = (1,) * (a.ndim - 2)
    fits = 2 <= a.ndim <= 5 and b.shape[1:] == (len(a), *ones)
    if fits and a.numel() and b.numel():
        return
    shapes = f"A has shape {tuple(a.shape)} and B {tuple(b.shape)}"
    if ones and b.ndim == a.ndim and b.shape[2:] == ones and 0 < b.shape[1] < len(a):
        problem = f"{shapes}, as PEFT has them for a grouped convolution: its A reads the inputs "
        problem += "of all groups, and no weight of the layer's shape computes that"
        raise FormatError("", problem, "Train it again with this package; PEFT cannot merge it")
    raise FormatError("", f"{shapes}, whose ranks or kernels do not fit", _DAMAGED)
