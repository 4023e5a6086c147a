"""Fit an adapter, as a value, to a model: its sites, its trained copies, its base.

Only this file matches a site from a file or from another model with the module of that name. It
uses the names and shapes of the adapter's own tensors, never patterns from a file, and raises an
error if site and module do not fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

from torch import Tensor

from lora_inject.core.adapter.other_tensors import only
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.kinds import KINDS
from lora_inject.core.layers.library import loaded_libraries
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.base import Base, check_base, check_base_copies
from lora_inject.core.model.fit_trained import fit_trained
from lora_inject.core.spec.inventory import Candidate, Inventory
from lora_inject.core.spec.names import nearest
from lora_inject.core.spec.patterns import named
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError, LayerError

# Fields of a site, besides its names, that come from the model, not from the adapter.
_OF_MODEL = ("kind", "weight_shape", "update")
_of_model = attrgetter(*_OF_MODEL)
_maps = attrgetter("in_features", "out_features", "experts")

Part = Callable[[AdapterState, Inventory], AdapterState]
"""Returns what of an adapter is for this process, given the names of the model."""


def fit(
    survey: Survey,
    state: AdapterState,
    *,
    leave_out: Sequence[str],
    base: Base,
    leave_new: bool,
    asked: str,
    part: Part | None = None,
) -> AdapterState:
    """Return an adapter in the names and the geometry of a model, with the tensors as they are.

    `part` returns what of it is for this process; by default it is for all of this model.
    """
    names = inventory(survey)
    state = _in_names_here(survey, state, part, names, leave_out, asked)
    specs = {key: fit_site(site.spec, names, asked) for key, site in state.sites.items()}
    trained: dict[str, Tensor] = {}
    rows: dict[str, tuple[int, ...]] = {}
    if state.trained:
        trained, rows = fit_trained(state, survey, names.buffers, asked)
    if base != "any":
        new = {state.sites[key].spec.weight: spec.weight for key, spec in specs.items()}
        adapted = {old: survey.at(name).tensor for old, name in new.items()}
        check_base(survey, state, adapted, base, asked, leave_new=leave_new)
    if state.base_copies:
        check_base_copies(state, survey.weights, asked)
    state.check_finite(asked, FormatError)
    sites = {spec.name: state.sites[key].at(spec) for key, spec in specs.items()}
    return AdapterState(sites, trained, state.config, rows=rows)


def _in_names_here(
    survey: Survey,
    state: AdapterState,
    part: Part | None,
    names: Inventory,
    leave_out: Sequence[str],
    asked: str,
) -> AdapterState:
    """Return what of an adapter is for this process, in the names of the model."""
    if leave_out:
        given = [*state.trained, *state.sites]
        gone = named(given, leave_out, f"{asked}, leave_out", FormatError)
        state = only(state, set(given) - gone.keys())
    for library in loaded_libraries():
        state = library.in_names_of(survey.model, state, survey.weights)
    if part is not None:
        state = part(state, names)
    if any(site.spec.aliases or site.spec.kind == "parameter" for site in state.sites.values()):
        state = dataclasses.replace(state, sites=as_held_here(state.sites, names))
    return state


def fit_site(spec: SiteSpec, names: Inventory, asked: str) -> SiteSpec:
    """Return a site's spec as this model holds it: the file's numbers, the module's geometry."""
    candidate = _place_of(spec, names, f"{asked}, site {spec.name!r}")
    lies = spec.transposed if spec.kind == "parameter" else candidate.transposed
    if (*_of_model(spec), spec.transposed) != (*_of_model(candidate), lies):
        here: dict[str, Any] = dict(zip(_OF_MODEL, _of_model(candidate), strict=True))
        spec = dataclasses.replace(spec, **here, transposed=lies)
    return spec.at(candidate.name, candidate.weight, candidate.aliases)


def _place_of(spec: SiteSpec, names: Inventory, where: str) -> Candidate:
    """Return what of the model has the name of a site, and can take it."""
    if spec.kind != "parameter" and all(row.kind != spec.kind for row in KINDS):
        unknown = f"its kind of layer, {spec.kind!r}, is not registered here"
        remedy = "Import the module that calls register_kind for it first"
        raise FormatError(where, unknown, remedy)
    candidate = names.of_site(spec.name, spec.kind)
    if candidate is None:
        close = ", ".join(map(repr, nearest(spec.name, names.sites))) or "none"
        problem, remedy = "the model has no such module", f"Nearest: {close}. {_ITS_MODEL}"
        raise FormatError(where, problem, remedy)
    if candidate.refusal is not None:
        raise LayerError(where, *candidate.refusal)
    is_parameter = spec.kind == "parameter"
    if parameter_fits(spec, candidate) if is_parameter else _maps(spec) == _maps(candidate):
        return candidate
    fits = (candidate.in_features, candidate.out_features)
    if is_parameter and spec.transposed != candidate.transposed:
        fits = fits[::-1]
    there = f"it maps {spec.in_features} to {spec.out_features} features in the file"
    raise FormatError(where, f"{there}, {fits[0]} to {fits[1]} here", _ITS_MODEL)


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
            there = spec.at(alias, alias + spec.weight.removeprefix(spec.name))
            other = names.of_site(there.name, there.kind)
            if alias not in sites and other and own and other.weight != own.weight:
                sites_of_aliases[alias] = replace(site, spec=there)
    return sites_of_aliases


def parameter_fits(spec: SiteSpec, candidate: Candidate) -> bool:
    """Whether a parameter maps as many features as the model's, which may lie the other way."""
    if spec.weight_shape == candidate.weight_shape:
        return True  # its layout may group the axes differently
    maps = (spec.in_features, spec.out_features)
    if spec.transposed != candidate.transposed:
        maps = maps[::-1]
    due = (candidate.in_features, candidate.out_features)
    return (maps, spec.experts) == (due, candidate.experts)
