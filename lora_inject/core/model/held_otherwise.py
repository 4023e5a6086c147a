"""Sites on layers that a model holds in another way than the one that an adapter was made on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.spec.inventory import Candidate, Inventory
from lora_inject.core.spec.sites import SiteSpec


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
