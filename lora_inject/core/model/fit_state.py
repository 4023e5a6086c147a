"""Fit an adapter, as a value, to a model: its sites, its trained copies, its base.

Only this file matches a site from a file or from another model with the module of that name. It
uses the names and shapes of the adapter's own tensors, never patterns from a file, and raises an
error if site and module do not fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.kinds import KINDS
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.base import Base, check_base, check_base_copies
from lora_inject.core.model.callers import Alone
from lora_inject.core.model.guards import functions
from lora_inject.core.spec.inventory import Candidate, Inventory
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError, LayerError

_ITS_MODEL = "Load the adapter onto the model that it was made for"
# Fields of a site, besides its names, that come from the model, not from the adapter.
_OF_MODEL = ("kind", "weight_shape", "update")


def fit(
    survey: Survey,
    state: AdapterState,
    all_of: Alone,
    *,
    leave_out: Sequence[str],
    base: Base,
    leave_new: bool,
    asked: str,
) -> AdapterState:
    """Return an adapter in the names and the geometry of a model, with the tensors as they are.

    `all_of` says which part of it is for this process.
    """
    names, weights = inventory(survey), survey.weights
    state = _without(state, leave_out, asked)
    for in_names_of in functions("in_names_of"):
        state = in_names_of(survey.model, state, weights)
    state = all_of.part_of_state(state, names)
    sites = {key: _stack_of_one(site, names) for key, site in state.sites.items()}
    state = dataclasses.replace(state, sites=sites | _under_further_names(sites, names))
    specs = {key: fit_site(site.spec, names, asked) for key, site in state.sites.items()}
    for key in state.trained.keys() & set(names.buffers):
        problem = "it is a buffer of the model, and adapters hold parameters only"
        remedy = "Merge it into the base with the program that made it, and start from that model"
        raise FormatError(f"{asked}, trained tensor {key!r}", problem, remedy)
    trained: dict[str, Tensor] = {}
    rows: dict[str, tuple[int, ...]] = {}
    if state.trained:
        from lora_inject.core.model.fit_trained import fit_trained

        trained, rows = fit_trained(state, survey, weights, asked)
    if base != "any":
        new = {state.sites[key].spec.weight: spec.weight for key, spec in specs.items()}
        adapted = {old: survey.at(name).tensor for old, name in new.items()}
        check_base(survey, state, adapted, base, asked, leave_new=leave_new)
    check_base_copies(state, weights, asked)
    state.check_finite(asked, FormatError)
    sites = {
        spec.name: dataclasses.replace(state.sites[key], spec=spec) for key, spec in specs.items()
    }
    return AdapterState(sites, trained, state.config, rows=rows)


def _without(state: AdapterState, patterns: Sequence[str], asked: str) -> AdapterState:
    """Leave out what the caller's patterns match; each must match something."""
    if not patterns:
        return state
    from lora_inject.core.spec.named import named

    names = [*state.trained, *state.sites]
    gone = named(names, patterns, f"{asked}, leave_out", FormatError)
    return state.only(set(names) - gone.keys())


def _candidate(spec: SiteSpec, names: Inventory) -> Candidate | None:
    """Return the model's candidate of a site's name."""
    if (place := names.sites.get(spec.name)) is not None:
        return names.candidates[place]
    place = names.weights.get(spec.name) if spec.kind == "parameter" else None
    return None if place is None else names.candidates[place].as_parameter(spec.name)


def _under_further_names(sites: Mapping[str, SiteState], names: Inventory) -> dict[str, SiteState]:
    """Return the sites of layers that were one layer where the adapter was made, and are not here.

    It has an adapter under each of its names, so each of these layers gets one.
    """
    sites_of_aliases = {}
    for site in sites.values():
        spec, own = site.spec, _candidate(site.spec, names)
        for alias in spec.aliases:
            there = spec.at(alias, alias + spec.weight.removeprefix(spec.name))
            other = _candidate(there, names)
            if alias not in sites and other and own and other.weight != own.weight:
                sites_of_aliases[alias] = dataclasses.replace(site, spec=there)
    return sites_of_aliases


def _stack_of_one(site: SiteState, names: Inventory) -> SiteState:
    """Return the site of a stack that holds one matrix as a stack, where the file does not tell."""
    spec, candidate = site.spec, _candidate(site.spec, names)
    if spec.kind != "parameter" or spec.experts is not None:
        return site
    if candidate is None or candidate.experts != 1:
        return site
    shape = (1, *spec.weight_shape[:: -1 if candidate.transposed else 1])
    spec = dataclasses.replace(spec, experts=1, weight_shape=shape, transposed=candidate.transposed)
    return SiteState.of(spec, {role: tensor[None] for role, tensor in site.tensors.items()})


def fit_site(spec: SiteSpec, names: Inventory, asked: str) -> SiteSpec:
    """Return a site's spec as this model holds it: the file's numbers, the module's geometry."""
    where = f"{asked}, site {spec.name!r}"
    if spec.kind != "parameter" and all(row.kind != spec.kind for row in KINDS):
        unknown = f"its kind of layer, {spec.kind!r}, is not registered here"
        raise FormatError(where, unknown, "Import the module that calls register_kind for it first")
    candidate = _candidate(spec, names)
    if candidate is None:
        from lora_inject.core.spec.spellings import nearest

        close = ", ".join(map(repr, nearest(spec.name, names.sites))) or "none"
        raise FormatError(where, "the model has no such module", f"Nearest: {close}. {_ITS_MODEL}")
    if candidate.refusal is not None:
        raise LayerError(where, *candidate.refusal)
    _check_shape(spec, candidate, where)
    here: dict[str, Any] = {key: getattr(candidate, key) for key in _OF_MODEL}
    if spec.kind != "parameter":
        here["transposed"] = candidate.transposed
    if any(getattr(spec, key) != value for key, value in here.items()):
        spec = dataclasses.replace(spec, **here)
    return spec.at(candidate.name, candidate.weight, candidate.aliases, from_rule=False)


def _check_shape(spec: SiteSpec, candidate: Candidate, where: str) -> None:
    """Check that a site maps as many features as the model's; a parameter may lie the other way."""
    is_parameter = spec.kind == "parameter"
    if is_parameter and spec.weight_shape == candidate.weight_shape:
        return  # its layout may group the axes differently
    maps = (spec.in_features, spec.out_features)
    fits = (candidate.in_features, candidate.out_features)
    if is_parameter and spec.transposed != candidate.transposed:
        fits = fits[::-1]
    if (maps, spec.experts) != (fits, candidate.experts):
        there = f"it maps {maps[0]} to {maps[1]} features in the file"
        raise FormatError(where, f"{there}, {fits[0]} to {fits[1]} here", _ITS_MODEL)
