"""The same adapter with some of its tensors, under other names, or of other experts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.functional.weight import of_every_expert
from lora_inject.errors import LoraInjectError

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def only(state: AdapterState, names: Collection[str]) -> AdapterState:
    """Return the sites and trained tensors of these names."""

    def kept(values: Mapping[str, T]) -> dict[str, T]:
        return {name: value for name, value in values.items() if name in names}

    sites, trained, rows = kept(state.sites), kept(state.trained), kept(state.rows)
    return replace(state, sites=sites, trained=trained, rows=rows)


def under_names(
    state: AdapterState, new: Callable[[str], str], error: type[LoraInjectError]
) -> AdapterState:
    """Return the adapter with its tensors under other names.

    `new` gives the name of a tensor of the base. A site is called after its weight, and so are the
    further names of its layer. Two tensors under one name are an error.
    """
    sites = []
    for name, site in state.sites.items():
        end, weight = site.spec.weight.removeprefix(name), new(site.spec.weight)
        further = (new(alias + end).removesuffix(end) for alias in site.spec.aliases)
        spec = site.spec.at(weight.removesuffix(end), weight, tuple(further))
        sites.append((spec.name, site.at(spec)))

    def moved(each: Mapping[str, T]) -> dict[str, T]:
        return distinct(((new(name), value) for name, value in each.items()), error)

    mark = state.fingerprint
    return replace(
        state,
        sites=distinct(sites, error),
        trained=moved(state.trained),
        rows=moved(state.rows),
        base_copies=moved(state.base_copies),
        fingerprint=mark and {new(name): known for name, known in mark.items()},
    )


def distinct(items: Iterable[tuple[K, T]], error: type[LoraInjectError]) -> dict[K, T]:
    """Return a mapping; two values under one name are an error."""
    named: dict[K, T] = {}
    for key, value in items:
        if key in named:
            where = f"the name '{getattr(key, 'name', key)}'"
            remedy = "Give each a name of its own, or leave one of them out"
            raise error(where, "two tensors of the adapter have it", remedy)
        named[key] = value
    return named


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
