"""Loading onto a model that `fully_shard` has sharded: the adapter becomes shards as well.

A parameter group of FSDP2 takes no new parameters. So `fully_shard` is called on each layer that
gets an adapter, with the mesh of its weight. The new Parameters become a separate group; the
layer's other Parameters are `ignored_params` of this call and stay in their group.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

from torch import nn

from lora_inject.errors import LayerError
from lora_inject.layers.survey import Survey, base_tensor
from lora_inject.model.attach import Place
from lora_inject.model.carried import entries
from lora_inject.model.sharding import fsdp2_modules


def check_layers(
    survey: Survey, asked: str, found: Iterable[Place], tied: Callable[[Place], Hashable]
) -> None:
    """Check that FSDP2 can shard a new adapter with its layers, before anything is changed."""
    groups = {id(module): module for module in fsdp2_modules(survey)}
    inside = {id(module) for group in groups.values() for module in group.modules()}
    holders: dict[Hashable, nn.Module] = {}
    for place in found:
        module = place.module
        *replicated, shard = getattr(place.weight, "placements", (None,))
        along_one = shard is not None and shard.is_shard()
        if id(module) in groups:
            reason = "fully_shard was called with this very layer, whose group takes no parameters"
        elif type(module).forward is nn.Module.forward:
            reason = "it has no forward, before which FSDP2 could gather the adapter"
        elif holders.setdefault(tied(place), module) is not module:
            reason = "its trained copy is tied to that of another layer"
        elif id(module) not in inside or not along_one or any(p.is_shard() for p in replicated):
            reason = "it is not sharded by fully_shard alone"
        else:
            continue
        remedy = "Load the adapter first, then shard the model"
        raise LayerError(f"{asked}, {place.name!r}", reason, remedy)


def shard_adapter(survey: Survey, name: str) -> None:
    """Shard the tensors of an adapter that was just put on, layer by layer."""
    from torch.distributed.fsdp import fully_shard

    new: dict[nn.Module, set[Any]] = {}
    meshes: dict[nn.Module, Any] = {}
    depths: dict[nn.Module, int] = {}
    for path, module, entry in entries(survey, name):
        new.setdefault(module, set()).update(entry.tensors(module).values())
        meshes[module] = base_tensor(module, entry.param).device_mesh  # type: ignore[attr-defined]
        depths[module] = path.count(".")
    for module in sorted(new, key=depths.__getitem__, reverse=True):  # as fully_shard asks
        old = {parameter for parameter in module.parameters() if parameter not in new[module]}
        fully_shard(module, mesh=meshes[module], reshard_after_forward=True, ignored_params=old)
