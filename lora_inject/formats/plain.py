"""Adapters in the form of most programs: for each module a plain pair of matrices and a scale.

Slices become block-diagonal matrices, and frozen starts become further ranks. For programs with one
rank and one scale, scales are folded into B and ranks padded with zeros. Deltas do not change.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.core.adapter.file_keys import one_line
from lora_inject.core.adapter.site_state import FLOATS, SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.functional.finite import lost_by_cast
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError
from lora_inject.formats.pairs import pairs_of
from lora_inject.formats.peft.tensor_layout import file_alpha, file_rank, plain_pair

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
"""Dtypes that writers accept, by name."""
_MERGE = "Merge the adapter into its base (lora-inject merge)"
_CLIP = re.compile(r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")


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
    changed = {}
    for name, site in sites.items():
        new_rank = common or site.spec.rank
        agreed = None if len(numbers) == 1 else float(largest)
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


def site_in_pairs(site: SiteState) -> SiteState:
    """Return a site without slices and frozen starts."""
    spec = site.spec
    if spec.slices is None and site.A0 is None:
        return site
    rank, alpha = file_rank(spec), file_alpha(spec, rslora=spec.scaling == "rslora")
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


def check_component(component: str | None, known: Collection[str]) -> str:
    """Return the part of a pipeline that a file is to name; refuse to write one without it."""
    if component is None or component not in known:
        unsaid = "the file has to name the part of a pipeline that the adapted model is"
        problem = unsaid if component is None else f"component is {component!r}"
        raise FormatError("", problem, f'Pass component="unet", or one of {", ".join(known)}')
    return component


def name_in_files(name: str, component: str) -> str:
    """Return the name of a module of a pipeline's component in files for other programs.

    Transformers 5.6 took `text_model.` off the names of CLIPTextModel. ComfyUI, sd-scripts and
    older versions of diffusers read only the names with it, diffusers 0.42.1 both.

    Examples:
        >>> name_in_files("encoder.layers.0.mlp.fc1", "te1")
        'text_model.encoder.layers.0.mlp.fc1'
    """
    flattened = component.startswith("te") and _CLIP.fullmatch(name)
    return f"text_model.{name}" if flattened else name


def in_component(
    tensors: Mapping[str, Tensor],
    parsed: Callable[[str], tuple[str, str, str]],
    component: str | None,
) -> tuple[str, dict[str, tuple[Tensor, Tensor, Tensor | None]]]:
    """Return the given component, or the only one, and A, B and alpha of its modules.

    `parsed` gives the component, the module and the role (`A`, `B`, `alpha`) of a key.
    """
    by_component: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        part, module, role = parsed(key)
        place = by_component.setdefault(part, {}).setdefault(module, {})
        if role in place:
            raise FormatError(f"'{key[:200]}'", "its site has this tensor twice", "Fetch it again")
        place[role] = tensor
    if component is None and len(by_component) == 1:
        component = next(iter(by_component))
    if component is None or component not in by_component:
        held = f"it holds {one_line(by_component)}" + (f", not '{component}'" if component else "")
        remedy = "Name the one to read, each onto its own model: "
        remedy += f'component="{next(iter(by_component), "unet")}" (--from-component)'
        if "" in by_component:
            remedy += '; or component="", if all are names of one model'
        raise FormatError("", held, remedy)
    of = by_component[component]
    pairs = pairs_of(of, "A", "B")
    return component, {module: (*pair, of[module].get("alpha")) for module, pair in pairs.items()}
