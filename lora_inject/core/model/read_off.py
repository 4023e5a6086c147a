"""Reading an adapter off a live model: its tensors, with the fingerprint of their base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor, nn

from lora_inject.core.adapter.fingerprint import moved_positions
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.library import loaded_libraries
from lora_inject.core.layers.weight_kinds import whole
from lora_inject.core.model.base import fingerprint, untouched
from lora_inject.core.roots.root import (
    Injected,
    adapted_modules,
    check_unmerged,
    whole_adapter,
)
from lora_inject.core.spec.names import joined
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import StateError


def values_on(
    survey: Injected,
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
    config = survey.root.adapters[name].config
    return AdapterState(sites, trained, config, rows=rows), weights


def read_off(
    survey: Injected, name: str, gathered: Mapping[str, Tensor] = MappingProxyType({})
) -> AdapterState:
    """Read an adapter from a model, as a value; see `adapter_state`.

    `gathered` are whole tensors by their keys in the state dict, for those that are sharded.
    """
    made: dict[int, Tensor] = {}  # a tied copy is gathered once, and stands under all its names

    def taken(held: Tensor, path: str, entry: Entry, role: str) -> Tensor:
        if id(held) not in made:
            there = whole(gathered.get(joined(path, entry.names[role]), held))
            if tuple(there.shape) != (due := entry.shape_of(role)):
                site = entry.spec.name if entry.spec else entry.param
                raise _of_shard(
                    name, f"{role} of {site!r} has shape {tuple(there.shape)}, not {due}"
                )
            made[id(held)] = there
        return made[id(held)]

    state, weights = values_on(survey, name, "adapter_state of", taken)
    for key, weight in weights.items():
        if not weight.numel():  # a fingerprint of it fits no base
            raise _of_shard(name, f"its base, {key!r}, has no elements")
    for _, _, attached in adapted_modules(survey):
        attached.check_started(attached.entries(name), "reading")
    # The fingerprint is to be that of the base, which merged weights are not.
    check_unmerged(f"saving adapter {name!r}", survey.root)
    moved = {s.spec.weight: moved_positions(s) for s in state.sites.values()}
    others = untouched(survey.weights, state)
    return replace(state, fingerprint=fingerprint(weights, others, moved))


def _of_shard(name: str, what: str) -> StateError:
    """Return the error of an adapter of which this process holds a shard."""
    remedy = "Call it within FullyShardedDataParallel.summon_full_params(model) or "
    remedy += "deepspeed.zero.GatheredParameters(list(model.parameters()))"
    problem = f"{what}: this process holds a shard of it"
    return StateError(f"adapter_state of {name!r}", problem, remedy)


def adapter_state(model: nn.Module, name: str = "default") -> AdapterState:
    """Read an adapter from a model, as a value.

    Args:
        model: The root, or a module that holds it.
        name: The adapter.

    Returns:
        Its state. The tensors are detached and share memory with the model's.

    Raises:
        StateError: There is no such adapter, a layer that carries it was replaced, the model is
            merged, or this process holds only a shard of a tensor.

    Examples:
        >>> from lora_inject.core.model.inject import inject
        >>> net = inject(nn.Sequential(nn.Linear(4, 6)), {"rank": 2, "targets": ["0"]})
        >>> site = adapter_state(net).sites["0"]
        >>> tuple(site.A.shape), tuple(site.B.shape), site.scale
        ((2, 4), (6, 2), 8.0)
    """
    return read_off(Injected(model, f"adapter_state of {name!r}"), name)
