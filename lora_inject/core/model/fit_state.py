"""Fit an adapter, as a value, to a model: its sites, its trained copies, its base.

Only this file matches a site from a file or from another model with the module of that name. It
uses the names and shapes of the adapter's own tensors, never patterns from a file, and raises an
error if site and module do not fit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lora_inject.core.adapter.other_tensors import only
from lora_inject.core.adapter.reshape import renamed
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.kinds import KINDS
from lora_inject.core.layers.library import loaded_libraries
from lora_inject.core.layers.survey import Survey, table_of
from lora_inject.core.model.base import Base, check_base, check_base_copies
from lora_inject.core.spec.inventory import Candidate, Inventory
from lora_inject.core.spec.names import nearest
from lora_inject.core.spec.patterns import named
from lora_inject.core.spec.sites import SiteSpec, fits_kernel
from lora_inject.errors import FormatError, LayerError, article
from lora_inject.formats.live_models import refuse_other_outputs

# Fields of a site, besides its names, that come from the model, not from the adapter.
_OF_MODEL = ("kind", "weight_shape", "update")
_of_model = attrgetter(*_OF_MODEL)
_maps = attrgetter("in_features", "out_features", "experts")


def fit(
    survey: Survey,
    state: AdapterState,
    leave_out: Sequence[str],
    base: Base,
    *,
    leave_new: bool,
    asked: str,
) -> AdapterState:
    """Return an adapter in the names and the geometry of a model, with the tensors as they are."""
    names, layers = inventory(survey), state.layers
    if leave_out:
        given = [*state.trained, *state.sites]
        gone = named(given, leave_out, f"{asked}, leave_out", FormatError)
        state = only(state, set(given) - gone.keys())
    for library in loaded_libraries():
        state = library.in_names_of(survey.model, state, survey.weights)
    if any(site.spec.aliases or site.spec.kind == "parameter" for site in state.sites.values()):
        state = replace(state, sites=as_held_here(state.sites, names))
    specs = {key: fit_site(site.spec, names, asked) for key, site in state.sites.items()}
    trained, rows = _fit_trained(state, survey, names.buffers, asked)
    if base != "any":
        new = {state.sites[key].spec.weight: spec.weight for key, spec in specs.items()}
        adapted = {old: survey.tensor(name) for old, name in new.items()}
        check_base(survey, state, adapted, base, asked, leave_new=leave_new)
    check_base_copies(state, survey, asked)
    state.check_finite(asked, FormatError)
    sites: dict[str, SiteState] = {}
    for key, spec in specs.items():
        if spec.name in sites:
            problem = "it has two sites for what is one layer in this model"
            raise FormatError(f"{asked}, site {key!r}", problem, _ITS_MODEL)
        sites[spec.name] = state.sites[key].at(spec)
    fitted = AdapterState(sites, trained, state.config, rows=rows, layers=layers)
    refuse_other_outputs(survey, fitted, asked)
    return fitted


def fit_site(spec: SiteSpec, names: Inventory, asked: str) -> SiteSpec:
    """Return a site's spec as this model holds it: the file's numbers, the module's geometry."""
    candidate = _place_of(spec, names, f"{asked}, site {spec.name!r}")
    lies = spec.transposed if spec.kind == "parameter" else candidate.transposed
    if (*_of_model(spec), spec.transposed) != (*_of_model(candidate), lies):
        here: dict[str, Any] = dict(zip(_OF_MODEL, _of_model(candidate), strict=True))
        spec = replace(spec, **here, transposed=lies)
    return spec.at(candidate.name, candidate.weight, candidate.aliases)


def _place_of(spec: SiteSpec, names: Inventory, where: str) -> Candidate:
    """Return what of the model has the name of a site, and can take it."""
    candidate = names.of_site(spec.name, spec.kind)
    if candidate is None or candidate.kind != spec.kind:
        _check_registered(spec, where)
    if candidate is None:
        close = ", ".join(map(repr, nearest(spec.name, names.sites))) or "none"
        problem, remedy = "the model has no such module", f"Nearest: {close}. {_ITS_MODEL}"
        raise FormatError(where, problem, remedy)
    if candidate.refusal is not None:
        raise LayerError(where, *candidate.refusal)
    is_parameter = spec.kind == "parameter"
    if _parameter_fits(spec, candidate) if is_parameter else _maps(spec) == _maps(candidate):
        other_kind = spec.kind == "embedding" != candidate.kind
        if other_kind or not fits_kernel(spec, candidate.weight_shape):
            there = f"it is for {article(spec.kind)} of shape {spec.weight_shape}"
            here = f"{article(candidate.kind)} of shape {candidate.weight_shape} is here"
            raise FormatError(where, f"{there}, and {here}", _ITS_MODEL)
        return candidate
    fits = (candidate.in_features, candidate.out_features)
    if is_parameter and spec.transposed != candidate.transposed:
        fits = fits[::-1]
    there = f"it maps {spec.in_features} to {spec.out_features} features in the file"
    raise FormatError(where, f"{there}, {fits[0]} to {fits[1]} here", _ITS_MODEL)


def _check_registered(spec: SiteSpec, where: str) -> None:
    if spec.kind != "parameter" and spec.kind not in KINDS:
        unknown = f"its kind of layer, {spec.kind!r}, is not registered here"
        remedy = "Import the module that calls extending.register_kind for it first"
        raise FormatError(where, unknown, remedy)


_ITS_MODEL = "Load the adapter onto the model that it was made for"


def as_held_here(sites: Mapping[str, SiteState], names: Inventory) -> dict[str, SiteState]:
    """Return sites as a model holds their layers.

    1. A stack that holds one matrix is a stack, where the file does not tell.
    2. Layers that were one layer where the adapter was made, and are not here, get one each.
    """
    held = {key: _stack_of_one(site, names) for key, site in sites.items()}
    return held | _under_further_names(held, names)


def _stack_of_one(site: SiteState, names: Inventory) -> SiteState:
    spec, candidate = site.spec, names.of_site(site.spec.name, site.spec.kind)
    if spec.kind != "parameter" or spec.experts is not None:
        return site
    if candidate is None or candidate.experts != 1:
        return site
    shape = (1, *spec.weight_shape[:: -1 if candidate.transposed else 1])
    spec = replace(spec, experts=1, weight_shape=shape, transposed=candidate.transposed)
    return SiteState.of(spec, {role: tensor[None] for role, tensor in site.tensors.items()})


def _under_further_names(sites: Mapping[str, SiteState], names: Inventory) -> dict[str, SiteState]:
    """Return the sites of layers that were one layer, by the names under which they are several."""
    sites_of_aliases = {}
    for site in sites.values():
        spec, own = site.spec, names.of_site(site.spec.name, site.spec.kind)
        for alias in spec.aliases:
            there = renamed(spec, alias)
            other = names.of_site(there.name, there.kind)
            if alias not in sites and other and own and other.weight != own.weight:
                sites_of_aliases[alias] = site.at(there)
    return sites_of_aliases


def _parameter_fits(spec: SiteSpec, candidate: Candidate) -> bool:
    """Whether a parameter maps as many features as the model's, which may lie the other way."""
    if spec.weight_shape == candidate.weight_shape:
        return True  # its layout may group the axes differently
    maps = (spec.in_features, spec.out_features)
    if spec.transposed != candidate.transposed:
        maps = maps[::-1]
    due = (candidate.in_features, candidate.out_features)
    return (maps, spec.experts) == (due, candidate.experts)


# Its trained copies -----------------------------------------------------------------------------


def _fit_trained(
    state: AdapterState, survey: Survey, buffers: Collection[str], asked: str
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Return the full copies by the model's names; equal copies of a tied tensor are one tensor.

    1. A tied tensor that the adapter names once, or with two values, is a copy under the names that
       it gives and nowhere else: those who write such files read them so.
    2. Rows of the input embedding are read under all its names, as they are written for all.
    """
    rows_of: dict[str, tuple[int, ...]] = {}
    fitted: dict[str, Tensor] = {}
    first: dict[int, list[Tensor]] = {}
    table = table_of(survey.model, "get_input_embeddings")
    for key, tensor in state.trained.items():
        weight, rows = survey.weights.get(key), state.rows.get(key)
        _check_copy(f"{asked}, trained tensor {key!r}", key, tensor, rows, weight, buffers)
        name = survey.at(key).name  # a module with two names is one module
        same = first.setdefault(id(weight), [])
        held = next((t for t in same if torch.equal(t, tensor)), None)
        if held is None:
            same.append(tensor)
        fitted[name] = tensor if held is None else held
        if rows is not None:
            is_input = survey.at(name)[1:] == (table, "weight")
            tied = survey.names_of(name) if is_input else ()
            further = [n for n in tied if n not in state.trained]
            fitted.update(dict.fromkeys(further, fitted[name]))
            rows_of.update(dict.fromkeys((name, *further), rows))
    return fitted, rows_of


def _check_copy(
    asked: str,
    key: str,
    tensor: Tensor,
    rows: tuple[int, ...] | None,
    weight: Tensor | None,
    buffers: Collection[str],
) -> None:
    """Raise if a tensor is not a copy of a model's tensor, or of its rows."""
    if key in buffers:
        problem = "it is a buffer of the model, and adapters hold parameters only"
        remedy = "Merge it into the base with the program that made it, and start from that model"
        raise FormatError(asked, problem, remedy)
    leave = f"{_ITS_MODEL}, or leave this tensor out with leave_out=[{key!r}]"
    if weight is None:
        raise FormatError(asked, "the model has no such parameter", leave)
    there, here = tuple(tensor.shape), tuple(weight.shape)
    if rows is None:
        if there != here:
            problem = f"it has shape {there} in the file and {here} here"
            raise FormatError(asked, problem, leave)
    elif len(here) != 2 or max(rows) >= here[0] or here[1:] != there[1:]:
        problem = f"it holds rows up to {max(rows)}, of {there[1:]} values, and the model's has "
        remedy = "Resize the vocabulary first: model.resize_token_embeddings(n)"
        raise FormatError(asked, f"{problem}the shape {here}", remedy)
