"""Adapters in the form of most programs: for each module a plain pair of matrices and a scale.

Slices become block-diagonal matrices, and frozen starts become further ranks. For programs with one
rank and one scale, scales are folded into B and ranks padded with zeros. Deltas do not change.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.adapter.value_checks import FLOATS, one_line
from lora_inject.core.files.strict_json import is_positive
from lora_inject.core.functional import all_finite
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError, within
from lora_inject.formats.peft.tensor_layout import file_alpha, file_rank, plain_pair

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
"""Dtypes that writers accept, by name."""
_DAMAGED = "The file is damaged or was edited; fetch it again"
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
    a scale of 1: B is multiplied in float32 at least and rounded once, to `dtype` or each tensor's
    own dtype. Values that become infinite by a cast to a narrower dtype are refused.
    """
    if state.trained:
        found = f"{client} cannot hold trained tensors, such as {one_line(state.trained)}"
        raise FormatError("", found, f"{_MERGE}, or train without `train`")
    if dtype is not None and dtype not in DTYPES:
        raise FormatError("", f"dtype is {dtype!r}", f"Give one of {', '.join(DTYPES)}")
    if not state.sites:
        raise FormatError("", "it has no sites", f"Give sites: {client} holds nothing else")
    sites = {}
    for name, site in state.sites.items():
        if site.spec.kind not in kinds:
            found = f"{client} cannot hold a site of kind '{site.spec.kind}'"
            raise FormatError(f"site '{name}'", found, f"{_MERGE}; kinds: {', '.join(kinds)}")
        if site.further:
            extra = f"{one_line(site.further)} of the variant '{site.spec.variant}'"
            raise FormatError(f"site '{name}'", f"{client} cannot hold {extra}", _MERGE)
        sites[name] = _plain(site)
    largest = max(site.spec.rank for site in sites.values())
    if rank is not None and rank < largest:
        remedy = "Give no rank, or truncate the adapter first (lora-inject truncate)"
        raise FormatError("", f"rank {rank} is asked for, and a site has rank {largest}", remedy)
    numbers = {(s.spec.rank if one_rank else 0, s.scale * s.spec.rank) for s in sites.values()}
    keep = alpha == "own" or (alpha == "one" and len(numbers) == 1)
    made = {}
    for name, site in sites.items():
        width = (rank or largest) if one_rank else site.spec.rank
        due = None if keep else float(largest if alpha == "one" else width)
        made[name] = _changed(site, width, due, None if dtype is None else DTYPES[dtype])
        if not all_finite(made[name].A, made[name].B):
            found = f"its values are not finite in {made[name].B.dtype}"
            raise FormatError(f"site '{name}'", found, "Give a wider dtype")
    return made


def _plain(site: SiteState) -> SiteState:
    """Return the site without slices and frozen starts."""
    spec, derived = site.spec, site.A0 is not None
    if spec.slices is None and not derived:
        return site
    rank, rslora = file_rank(spec, derived=derived), spec.scaling == "rslora"
    alpha = file_alpha(spec, derived=derived, rslora=rslora)
    spec = dataclasses.replace(spec, rank=rank, alpha=alpha, slices=None)
    a, b = plain_pair(site)
    return SiteState(spec, a.reshape(spec.a_shape), b.reshape(spec.b_shape))


def _changed(
    site: SiteState, rank: int, alpha: float | None, dtype: torch.dtype | None
) -> SiteState:
    """Return a plain site with another rank, alpha and dtype, and the same delta."""
    A, B, spec = site.A.detach(), site.B.detach(), site.spec
    if alpha is None:
        return SiteState(spec, A.to(dtype or A.dtype), B.to(dtype or B.dtype))
    made = dataclasses.replace(spec, rank=rank, alpha=alpha, scaling="standard", dropout=0.0)
    a = A.new_zeros(made.a_shape, dtype=dtype or A.dtype)
    b = B.new_zeros(made.b_shape, dtype=dtype or B.dtype)
    a[..., : spec.rank, :] = A.to(a.dtype)
    wide = B.to(torch.promote_types(B.dtype, torch.float32))
    b[..., : spec.rank] = (wide * (site.scale / made.scale)).to(b.dtype)
    return SiteState(made, a, b)


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
    found = f"A has shape {tuple(a.shape)} and B {tuple(b.shape)}"
    if not (a.numel() and b.numel()) or not 2 <= a.ndim <= 5 or a.ndim != b.ndim:
        raise FormatError("", f"{found}, which is not a low-rank pair", _DAMAGED)
    if any(size != 1 for size in b.shape[2:]):
        raise FormatError("", f"{found}, and a kernel in B is not supported", _DAMAGED)
    if a.shape[0] != b.shape[1]:
        groups = a.ndim > 2 and a.shape[0] % b.shape[1] == 0
        remedy = "PEFT's grouped convolutions have no dense delta; they cannot be read"
        raise FormatError("", f"{found}: the ranks differ", remedy if groups else _DAMAGED)


def pairs_of(
    parts: Mapping[str, Mapping[str, Tensor]], a: str, b: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return complete pairs by module.

    `parts` are a file's tensors by module and by role; `a` and `b` are the roles of a pair.
    """
    for module, found in parts.items():
        for role in {a, b} - found.keys():
            raise FormatError(f"site '{module[:200]}'", f"its {role} is missing", _DAMAGED)
    if not parts:
        raise FormatError("", "it holds no pair of matrices", "Check the path")
    return {module: (found[a], found[b]) for module, found in parts.items()}


def matrices(
    tensors: Mapping[str, Tensor], ends: tuple[str, str], remedy: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the pairs of a file, which must hold nothing else, by the keys without their ends.

    `remedy` is for any other tensor.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        end = next((end for end in ends if key.endswith(end)), None)
        if end is None or tensor.ndim != 2:
            found = f"'{key[:200]}' of shape {tuple(tensor.shape)} is not a matrix of a pair"
            raise FormatError("", found, remedy)
        parts.setdefault(key.removesuffix(end), {})[end.strip(".")] = tensor
    return pairs_of(parts, ends[0].strip("."), ends[1].strip("."))


def check_component(component: str | None, known: Collection[str]) -> str:
    """Return the part of a pipeline that a file is to name; refuse to write one without it."""
    if component is None or component not in known:
        unsaid = "the file has to name the part of a pipeline that the adapted model is"
        found = unsaid if component is None else f"component is {component!r}"
        raise FormatError("", found, f'Pass component="unet", or one of {", ".join(known)}')
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
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        part, module, role = parsed(key)
        place = found.setdefault(part, {}).setdefault(module, {})
        if role in place:
            raise FormatError(f"'{key[:200]}'", "its site has this tensor twice", "Fetch it again")
        place[role] = tensor
    if component is None and len(found) == 1:
        component = next(iter(found))
    if component is None or component not in found:
        held = f"it holds {one_line(found)}" + (f", not '{component}'" if component else "")
        remedy = "Name the one to read, each onto its own model: "
        remedy += f'component="{next(iter(found), "unet")}" (--from-component)'
        if "" in found:
            remedy += '; or component="", if all are names of one model'
        raise FormatError("", held, remedy)
    of = found[component]
    pairs = pairs_of(of, "A", "B")
    return component, {module: (*pair, of[module].get("alpha")) for module, pair in pairs.items()}
