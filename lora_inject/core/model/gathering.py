"""The first values of an adapter on a model with DTensors, whole and alike in every process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_inject.core.layers.starting import first_values
from lora_inject.core.layers.survey import Carried, Survey
from lora_inject.core.model.target import whole
from lora_inject.distributed.sharding import meshes


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
