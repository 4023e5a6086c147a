"""The same adapter with other tensors: some of them, or those of other experts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TypeVar

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.functional.weight import of_every_expert

T = TypeVar("T")


def only(state: AdapterState, names: Collection[str]) -> AdapterState:
    """Return the sites and trained tensors of these names."""

    def kept(values: Mapping[str, T]) -> dict[str, T]:
        return {name: value for name, value in values.items() if name in names}

    sites, trained, rows = kept(state.sites), kept(state.trained), kept(state.rows)
    return replace(state, sites=sites, trained=trained, rows=rows)


def with_every_expert(state: AdapterState) -> AdapterState:
    """Return the adapter with A and B of each expert of every stack: zeros where one has none."""
    return replace(state, sites={n: _of_every_expert(site) for n, site in state.sites.items()})


def _of_every_expert(site: SiteState) -> SiteState:
    spec = site.spec
    if spec.only is None and not spec.share:
        return site
    n = spec.experts or 1
    tensors = {r: of_every_expert(t, spec, n).contiguous() for r, t in site.tensors.items()}
    return site.of(replace(spec, only=None, share=""), tensors)
