"""An adapter on whole stacks as one on the experts of a slot: files of others hold every expert."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError

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
        if name is not None and _is_whole(sites[name].spec, held.spec):
            sites[name] = _on_part(sites[name], held.spec, f"{asked}, site {key!r}")
    return replace(state, sites=sites)


def _is_whole(new: SiteSpec, held: SiteSpec) -> bool:
    """Whether a site is a whole stack, and that of the slot a part of one."""
    is_part = held.only is not None or bool(held.share)
    return is_part and new.experts == held.experts and new.only is None and not new.share


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
