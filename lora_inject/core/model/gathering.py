"""Whole tensors of a sharded model: merged weights one at a time, first values of an adapter.

1. Every process goes through the model in the same order, and gathers the shards of one tensor and
   of its adapters.
2. These stand in a module of their own, under the names that they have in theirs, and are merged
   there as any tensor is.
3. A tensor is given away before the next one is gathered, so that one is in memory at a time.

What could fail in one process alone would leave the others waiting: so values are looked at when
they are whole, which all processes see alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.first_values import first_values
from lora_inject.core.layers.gains import check_mixed
from lora_inject.core.layers.library import loaded_libraries
from lora_inject.core.layers.plain_tensors import is_quantized, sharded_by
from lora_inject.core.layers.survey import Carried, Holder, Survey
from lora_inject.core.model.merge_targets import add_entry
from lora_inject.core.model.merged_rows import counted_in
from lora_inject.core.model.packed_target import Into
from lora_inject.core.model.target import Target
from lora_inject.core.roots.carried import whole_adapter
from lora_inject.core.spec.names import joined
from lora_inject.distributed.sharding import meshes
from lora_inject.errors import LayerError

Taking = Sequence[tuple[Entry, float]]


def gathered_weights(
    survey: Survey,
    mix: Iterable[tuple[str, float]],
    into: Into,
    kept: dict[str, float] | None,
) -> Iterator[tuple[str, Tensor]]:
    """Return an iterator over the base's parameters as a merge would leave them, all whole.

    Args:
        survey: Of a model with DTensors.
        mix: Adapters and their weights.
        into: What quantized weights become.
        kept: Gets the share of each delta that rounding kept.

    Raises:
        LayerError: A weight is quantized, or sharded in another way.
    """
    for library in loaded_libraries():
        library.before_read(survey)
    taking: dict[str, list[tuple[Entry, float]]] = {}
    for adapter, weight in mix:
        for path, _, entry in whole_adapter(survey, adapter, "merged_weights of"):
            taking.setdefault(joined(path, entry.param), []).append((entry, weight))
    for entries in taking.values():
        check_mixed(entries)
    for holder in survey.holders:
        _check(holder, into)
    return _each(survey, taking, kept)


def _check(holder: Holder, into: Into) -> None:
    """Refuse what cannot be gathered, before the first tensor."""
    asked = f"merged_weights, {holder.name!r}"
    if into is not None or is_quantized(holder.tensor):
        problem = "the model is sharded, and its weights are quantized or to be dequantized"
        raise LayerError(asked, problem, "Call it on an unsharded copy")
    if not hasattr(holder.tensor, "full_tensor") and (how := sharded_by(holder.tensor)):
        raise LayerError(asked, f"it is sharded by {how}", "Shard with fully_shard alone")


def _each(
    survey: Survey, taking: Mapping[str, Taking], kept: dict[str, float] | None
) -> Iterator[tuple[str, Tensor]]:
    for path, module in survey.modules:
        for key, parameter in survey.own[id(module)].items():
            name = joined(path, key)
            if name not in taking:
                yield name, whole(parameter)
            else:
                yield name, _merged(Holder(name, module, key), taking[name], kept)


def _merged(holder: Holder, entries: Taking, kept: dict[str, float] | None) -> Tensor:
    """Return one merged tensor, from whole copies of all that it takes."""
    held = holder.module._parameters
    needed = {holder.param, *(name for entry, _ in entries for name in entry.names.values())}
    stand_in = nn.Module()
    for name in sorted(needed):
        values = held[name]
        if values is not None:
            whole_values = nn.Parameter(whole(values), requires_grad=False)
            stand_in.register_parameter(name, whole_values)
    target = Target(Holder(holder.name, stand_in, holder.param))
    for entry, weight in entries:
        add_entry(target, entry, weight)
    return counted_in(target, kept)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; a collective operation where each process holds a part of it."""
    values = tensor.detach()
    gather = getattr(values, "full_tensor", None)
    if gather is None:
        return values
    gathered: Tensor = gather()
    return gathered


@torch.no_grad()
def first_values_alike(survey: Survey, place: Carried) -> dict[str, Tensor]:
    """Return the values that a new adapter starts with at a layer of a model with DTensors.

    Whole, and the same in every process: those of the first one. A collective operation.
    """
    weight: Any = place.weight
    values = first_values(place.module, place.entry, whole(weight))
    spread = [weight.device_mesh] if hasattr(weight, "full_tensor") else meshes(survey)
    for mesh in spread:
        for axis in range(mesh.ndim):
            group = mesh.get_group(axis)
            source = torch.distributed.get_global_rank(group, 0)
            for tensor in values.values():
                torch.distributed.broadcast(tensor, source, group)
    return values
