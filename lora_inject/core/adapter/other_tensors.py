"""The same adapter with other tensors: some of them, or those of other experts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.functional.weight import of_every_expert
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError

T = TypeVar("T")


def site_mapped(site: SiteState, change: Callable[[Tensor], Tensor]) -> SiteState:
    """Return a site with each tensor changed."""
    return site.of(site.spec, {role: change(tensor) for role, tensor in site.tensors.items()})


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


# ------------------------------------------------------- whole stacks as those of a slot

_REMEDY = "Load it under another name and activate that"


def on_parts(state: AdapterState, slot: AdapterState, asked: str) -> AdapterState:
    """Return an adapter whose stacks have the experts and the shared factor of a slot's.

    Raises:
        FormatError: An expert that the slot leaves out has an update, or experts that share a
            factor there have their own.
    """
    sites = dict(state.sites)
    for key, held in slot.sites.items():
        name = next((n for n in (key, *held.spec.aliases) if n in sites), None)
        is_part = held.spec.only is not None or bool(held.spec.share)
        if name is None or not is_part:
            continue
        new = sites[name].spec
        if new.experts == held.spec.experts and new.only is None and not new.share:
            sites[name] = _on_part(sites[name], held.spec, f"{asked}, site {key!r}")
    return replace(state, sites=sites)


def _on_part(site: SiteState, held: SiteSpec, asked: str) -> SiteState:
    if held.only is not None:
        left = [expert for expert in range(held.experts or 0) if expert not in held.only]
        updated = [expert for expert in left if site.A[expert].any() and site.B[expert].any()]
        if updated:
            problem = f"it updates expert {updated[0]:,}, which the one on the model leaves out"
            raise FormatError(asked, problem, _REMEDY)
    tensors = {role: _of_part(t, role, held, asked) for role, t in site.tensors.items()}
    return SiteState.of(replace(site.spec, only=held.only, share=held.share), tensors)


def _of_part(tensor: Tensor, role: str, held: SiteSpec, asked: str) -> Tensor:
    if held.only is not None:
        return tensor[list(held.only)]
    if role[:1] != held.share:
        return tensor
    if bool((tensor != tensor[:1]).any()):
        problem = f"its experts have a factor {role} each, and one for all on the model"
        raise FormatError(asked, problem, _REMEDY)
    return tensor[:1]
