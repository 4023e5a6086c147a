"""Where a site lives in a PEFT file, and in what shape: both directions, stated once.

A PEFT file holds for each adapted module one plain pair of matrices under a key made from its name:
also for a site with slices (block-diagonal B), with a frozen start (A0, B0 as further ranks: the
site is `derived`) or with experts. Where PEFT sees the weight the other way round than the spec,
the pair is `turned`, and A and B have changed places: `(B A)^T = A^T B^T`.

Source: peft 0.21.2, tuners/lora/layer.py (`Linear`, `Embedding`, `_ConvNd`, `ParamWrapper`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from lora_inject.core.adapter.file_keys import check_no_clash
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.spec.names import Below, joined, leaf, parent
from lora_inject.core.spec.sites import FROM_WEIGHT, SiteSpec
from lora_inject.errors import FormatError
from lora_inject.formats.pairs import pair_rank, plain_pair

PREFIX = "base_model.model."
KINDS = ("linear", "conv1d", "embedding", "conv", "parameter")
ROWS = "token_adapter.trainable_tokens_delta"
_FURTHER = {"m": "lora_magnitude_vector", "b": "lora_B.bias"}
_KEYS = {"A": "lora_A.weight", "B": "lora_B.weight", **_FURTHER}
_KEYS_OF_EMBEDDING = {"A": "lora_embedding_A", "B": "lora_embedding_B", **_FURTHER}

_ROLES = {f".{end}": r for keys in (_KEYS, _KEYS_OF_EMBEDDING) for r, end in keys.items()}


def parsed(key: str) -> tuple[str, str] | None:
    """Return the path and the role of a site's tensor; None for another tensor.

    Examples:
        >>> parsed("h.0.fc.lora_A.weight"), parsed("h.0.fc.weight")
        (('h.0.fc', 'A'), None)
    """
    end = next((end for end in _ROLES if key.endswith(end)), None)
    return None if end is None else (key.removesuffix(end), _ROLES[end])


class Layout(NamedTuple):
    """The keys of a file: of each site by name and role, of each trained tensor by its name."""

    sites: Mapping[str, Mapping[str, str]]
    trained: Mapping[str, str]
    keys: Collection[str]  # all of them


def is_turned(spec: SiteSpec, transposed_modules: Collection[str] | None = None) -> bool:
    """Whether PEFT sees a parameter the other way round than its spec.

    PEFT takes a matrix for (out, in), and a stack of matrices for (experts, out, in) unless the
    module that owns it has transformers' `is_transposed`. Where no names of such modules are given,
    the specs are right.
    """
    if spec.kind != "parameter":
        return False
    if spec.experts is None:
        return spec.transposed
    if transposed_modules is None:
        return False
    return spec.transposed != (parent(spec.name) in transposed_modules)


def wrapped(spec: SiteSpec) -> str:
    """The module that PEFT wraps for a site."""
    return parent(spec.name) if spec.kind == "parameter" else spec.name


def attentions(specs: Iterable[SiteSpec]) -> dict[str, str]:
    """Return the sites that PEFT adapts by the name of their nn.MultiheadAttention, with that name.

    These are `in_proj_weight` and `out_proj` together, of one rank and scale. PEFT computes with
    W + 2 delta of `out_proj`, in a forward and in a merge (0.14 to 0.21, tuners/lora/layer.py,
    `MultiheadAttention.merge`): its files hold half of that site's B (`is_half`).
    """
    by_name = {spec.name: spec for spec in specs}
    called: dict[str, str] = {}
    for name, into in by_name.items():
        out = by_name.get(joined(parent(name), "out_proj"))
        if out is None or into.kind != "parameter" or leaf(name) != "in_proj_weight":
            continue
        plain = all((spec.variant, spec.lora_bias) == ("lora", False) for spec in (into, out))
        alike = (pair_rank(into), into.scale) == (pair_rank(out), out.scale)
        if plain and alike and (out.kind, out.update) == ("linear", "weight"):
            called |= dict.fromkeys((name, out.name), parent(name))
    return called


def is_half(name: str, called: Mapping[str, str]) -> bool:
    """Whether a site is the output projection of one of these `attentions`."""
    return name in called and leaf(name) == "out_proj"


def layout_of(
    specs: Iterable[SiteSpec], trained: Iterable[str], rows: Collection[str] = ()
) -> Layout:
    """Return the keys of an adapter's tensors in a PEFT file, which are refused if two are equal.

    Specs are in the order of the model. `rows` are the names among `trained` of which only rows are
    stored. PEFT wraps a module once for itself and once for each of its adapted parameters, the
    first of them innermost, and each wrapper adds `.base_layer` to the path of what is inside it.

    Examples:
        >>> spec = SiteSpec("h.0.fc", "linear", 4, 6, (6, 4), rank=2, alpha=2)
        >>> layout = layout_of([spec], ["h.0.fc.bias", "ln.weight"])
        >>> layout.sites["h.0.fc"]["A"]
        'base_model.model.h.0.fc.lora_A.weight'
        >>> list(layout.trained.values())
        ['base_model.model.h.0.fc.base_layer.bias', 'base_model.model.ln.weight']
    """
    on: dict[str, list[SiteSpec]] = {}
    for spec in specs:
        on.setdefault(wrapped(spec), []).append(spec)
    wrappers = Below(on)

    def path_of(name: str) -> str:
        """The path of a name inside the wrappers of the modules around it."""
        if parent(name) not in wrappers:
            return PREFIX + name
        *outer, last = name.split(".")
        path, module = PREFIX, ""
        for part in outer:
            module = joined(module, part)
            path += part + ".base_layer" * len(on.get(module, ())) + "."
        return path + last

    sites = {}
    for module, members in on.items():
        path = path_of(module)
        for spec in reversed(members):
            keys = _KEYS_OF_EMBEDDING if spec.kind == "embedding" else _KEYS
            sites[spec.name] = {role: f"{path}.{keys[role]}" for role in spec.shapes}
            path += ".base_layer"
    full = {name: path_of(name) for name in trained}
    full |= {name: joined(parent(full[name]), ROWS) for name in full if name in rows}
    every = [*chain.from_iterable(map(dict.values, sites.values())), *full.values()]
    check_no_clash(every)
    return Layout(sites, full, every)


# Shapes -----------------------------------------------------------------------------------------


def file_shapes(spec: SiteSpec, *, turned: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a site's tensors in the file, by role.

    Examples:
        >>> file_shapes(SiteSpec("c", "conv", 18, 4, (4, 2, 3, 3), rank=2, alpha=2))
        {'A': (2, 2, 3, 3), 'B': (4, 2, 1, 1)}
    """
    shapes, rank = dict(spec.shapes), pair_rank(spec)
    n_in, n_out, experts = spec.in_features, spec.out_features, spec.experts or 1
    if spec.kind == "conv":
        kernel = spec.weight_shape[1:]
        ones = (1,) * (len(kernel) - 1)
        shapes |= {"A": (rank, *kernel), "B": (n_out, rank, *ones)}
        if "m" in shapes and ones:  # PEFT stores magnitudes broadcastable
            shapes["m"] = (1, *shapes["m"], *ones)
        return shapes
    n_in, n_out = (n_out, n_in) if turned else (n_in, n_out)
    return shapes | {"A": (experts * rank, n_in), "B": (n_out, rank * experts)}


def pack(site: SiteState, *, turned: bool = False) -> tuple[Tensor, Tensor]:
    """Return a site's pair as PEFT stores it, of `file_shapes`.

    Experts: A is stacked by expert, B's columns are ordered by rank first and expert second.
    """
    a, b = plain_pair(site)
    if turned:
        a, b = b.mT, a.mT
    shapes = file_shapes(site.spec, turned=turned)
    return a.reshape(shapes["A"]), b.permute(1, 2, 0).reshape(shapes["B"])


def unpack(spec: SiteSpec, tensors: Mapping[str, Tensor], *, turned: bool = False) -> SiteState:
    """Return the site of a file's tensors by role, the inverse of `pack`.

    It is an error if a shape is another than `file_shapes` says, or if B is not zero where the
    slices say that nothing is adapted.
    """
    due = file_shapes(spec, turned=turned)
    for role, shape in due.items():
        if tensors[role].shape != shape:
            problem = f"its {role} has the shape {tuple(tensors[role].shape)} where {shape} is due"
            raise FormatError(f"site '{spec.name}'", problem, "The file was edited; fetch it again")
    further = {r: tensors[r].reshape(spec.shapes[r]) for r in spec.shapes if r in "mb"}
    a, b = tensors["A"], tensors["B"]
    if not turned and due == spec.shapes:
        return SiteState(spec, a, b, further=further)
    experts, rank = spec.experts or 1, pair_rank(spec)
    a = a.reshape(experts, rank, -1)
    b = b.reshape(b.shape[0], rank, experts).permute(2, 0, 1)
    if turned:
        a, b = b.mT, a.mT
    if spec.init not in FROM_WEIGHT:
        return SiteState(spec, *_native(spec, a, b), further=further)
    half = rank // 2
    pair = _native(spec, a[:, :half], b[:, :, :half])
    start = _native(spec, a[:, half:], -b[:, :, half:])
    return SiteState(spec, *pair, *start, further)


def _native(spec: SiteSpec, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Plain to native; the zeros outside the adapted slices are checked, not believed."""
    if spec.slices is not None:
        rank, spans = spec.rank, enumerate(spec.spans)
        parts = [b[:, start:stop, n * rank : (n + 1) * rank] for n, (start, stop) in spans]
        whole, b = b, torch.cat(parts, dim=1)
        if n_stray := int(torch.count_nonzero(whole) - torch.count_nonzero(b)):
            slices = list(spec.slices.adapt)
            problem = f"{n_stray} values of B lie outside the adapted slices {slices}"
            remedy = "The file was changed after it was written; fetch it again"
            raise FormatError(f"site '{spec.name}'", problem, remedy)
    return a.reshape(spec.a_shape).contiguous(), b.reshape(spec.b_shape).contiguous()
