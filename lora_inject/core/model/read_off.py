"""Reading an adapter off a live model: its tensors, with the fingerprint of their base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor

from lora_inject.core.adapter.fingerprint import moved_positions
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.library import loaded_libraries
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.base import fingerprint, untouched
from lora_inject.core.model.spread import gathered_whole, refuse_empty_base
from lora_inject.core.roots.carried import (
    adapted_modules,
    check_unmerged,
    reach,
    roots_of,
    whole_adapter,
)
from lora_inject.core.spec.names import joined
from lora_inject.core.spec.sites import SiteSpec


def values_on(
    survey: Survey,
    name: str,
    asked: str,
    taken: Callable[[Tensor, str, Entry, str], Tensor] = lambda held, *_: held,
) -> tuple[AdapterState, dict[str, Tensor]]:
    """Return an adapter on a model, without a fingerprint, and the frozen weights of its sites.

    `taken` says what stands in it for a Parameter, given the name of the module, the entry and the
    role.
    """
    for library in loaded_libraries():
        library.before_read(survey)
    parts: list[tuple[SiteSpec, dict[str, Tensor]]] = []
    biases: dict[str, dict[str, Tensor]] = {}  # of B, by the name of the module
    trained: dict[str, Tensor] = {}
    rows: dict[str, tuple[int, ...]] = {}
    weights: dict[str, Tensor] = {}
    for item in whole_adapter(survey, name, asked):
        path, module, entry = item
        held = entry.tensors(module).items()
        tensors = {role: taken(tensor, path, entry, role) for role, tensor in held}
        if entry.spec is not None:
            parts.append((entry.spec, tensors))
            weights[entry.spec.weight] = item.weight
        elif entry.scale is not None:
            biases[path] = tensors
        else:
            trained[item.name] = tensors["T"]
            if entry.rows is not None:
                rows[item.name] = entry.rows
    sites = {
        spec.name: SiteState.of(spec, tensors | biases.get(spec.name, {}))
        for spec, tensors in parts
    }
    records = roots_of(survey).values()
    config = next((root.configs[name] for root in records if name in root.configs), None)
    return AdapterState(sites, trained, config, rows=rows), weights


def read_off(
    survey: Survey, name: str, gathered: Mapping[str, Tensor] = MappingProxyType({})
) -> AdapterState:
    """Read an adapter from a model, as a value; see `adapter_state`.

    `gathered` are whole tensors by their keys in the state dict, for those that are sharded.
    """
    whole: dict[int, Tensor] = {}  # a tied copy is gathered once, and stands under all its names

    def taken(held: Tensor, path: str, entry: Entry, role: str) -> Tensor:
        if id(held) not in whole:
            there = gathered.get(joined(path, entry.names[role]), held)
            whole[id(held)] = there.detach()
            if hasattr(there, "full_tensor") or tuple(there.shape) != entry.shape_of(role):
                whole[id(held)] = gathered_whole(there, entry, role)
        return whole[id(held)]

    state, weights = values_on(survey, name, "adapter_state of", taken)
    if not all(weight.numel() for weight in weights.values()):
        refuse_empty_base(weights, name)
    for _, _, attached in adapted_modules(survey):
        attached.check_started(attached.entries(name), "reading")
    # The fingerprint is to be that of the base, which merged weights are not.
    check_unmerged(f"saving adapter {name!r}", *reach(survey.model, survey).selections)
    moved = {s.spec.weight: moved_positions(s) for s in state.sites.values()}
    others = untouched(survey.weights, state)
    return replace(state, fingerprint=fingerprint(weights, others, moved))
