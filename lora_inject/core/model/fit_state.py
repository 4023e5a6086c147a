"""Fit an adapter, as a value, to a model: its sites, its trained copies, its base.

Only this file matches a site from a file or from another model with the module of that name. It
uses the names and shapes of the adapter's own tensors, never patterns from a file, and raises an
error if site and module do not fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

from lora_inject.core.adapter.other_tensors import only
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.kinds import KINDS
from lora_inject.core.layers.library import loaded_libraries
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.base import Base, check_base
from lora_inject.core.model.fit_trained import fit_trained
from lora_inject.core.model.held_otherwise import as_held_here, parameter_fits
from lora_inject.core.model.other_base import check_base_copies
from lora_inject.core.model.unfit import why_unfit
from lora_inject.core.spec.inventory import Candidate, Inventory
from lora_inject.core.spec.named import named
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError

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
    candidate = names.of_site(spec.name, spec.kind)
    if candidate is None or candidate.refusal is not None or not _fits(spec, candidate):
        raise why_unfit(spec, candidate, names, f"{asked}, site {spec.name!r}")
    lies = spec.transposed if spec.kind == "parameter" else candidate.transposed
    if (*_of_model(spec), spec.transposed) != (*_of_model(candidate), lies):
        here: dict[str, Any] = dict(zip(_OF_MODEL, _of_model(candidate), strict=True))
        spec = dataclasses.replace(spec, **here, transposed=lies)
    return spec.at(candidate.name, candidate.weight, candidate.aliases)


def _fits(spec: SiteSpec, candidate: Candidate) -> bool:
    """Whether a site maps as many features as the model's."""
    if spec.kind == "parameter":
        return parameter_fits(spec, candidate)
    if spec.kind not in map(attrgetter("kind"), KINDS):
        return False
    return _maps(spec) == _maps(candidate)
