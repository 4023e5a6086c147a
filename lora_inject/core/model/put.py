"""Putting the sites and the trained tensors of a plan onto a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.library import loaded_libraries
from lora_inject.core.layers.starting import first_values
from lora_inject.core.layers.survey import Carried, Survey, memory_of
from lora_inject.core.model.attach import attach, survey_for
from lora_inject.core.model.in_full import check_statistics
from lora_inject.core.model.places import places
from lora_inject.core.model.reached import refuse_unreached
from lora_inject.core.model.target import whole
from lora_inject.core.model.trainable import check_live_inputs
from lora_inject.core.spec.inventory import Inventory
from lora_inject.core.spec.plan import Plan
from lora_inject.distributed.sharding import meshes
from lora_inject.errors import LayerError


def surveyed(model: nn.Module, name: str) -> tuple[Survey, Inventory]:
    """Return a model that can take a new adapter of that name, and its names."""
    survey = survey_for(model, name)
    check_live_inputs(survey, f"inject {name!r}")
    return survey, inventory(survey)


def put_plan_on(
    survey: Survey,
    name: str,
    planned: Plan,
    wanted: Sequence[Carried],
    probe: Callable[[], Any] | None,
    agreed: Callable[[], None] = lambda: None,
) -> None:
    """Put a new adapter on, all of it or nothing; `agreed` is the last that may refuse it."""
    spread = any(hasattr(tensor, "full_tensor") for tensor in survey.tensors)

    def initial(place: Carried) -> Mapping[str, Tensor]:
        if spread:  # several processes start with the same values
            return _first_values_alike(survey, place)
        return first_values(place.module, place.entry, place.weight)

    def last() -> None:
        if probe is not None:
            refuse_unreached(survey.model, probe)
        agreed()

    attach(survey, name, wanted, initial, _tied, planned.config.to_dict(), last=last)


@torch.no_grad()
def _first_values_alike(survey: Survey, place: Carried) -> dict[str, Tensor]:
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


def places_of_plan(
    survey: Survey, name: str, planned: Plan, present: Inventory, *, leave_new: bool
) -> list[Carried]:
    """Return where the sites and trained tensors of a plan go; everything can take them."""
    for library in loaded_libraries():
        for problem, remedy in library.against(survey, planned, leave_new=leave_new):
            raise LayerError(f"inject {name!r}", problem, remedy)
    named = {
        key: trained.rows for trained in planned.trained for key in survey.names_of(trained.name)
    }
    wanted = places(survey, name, planned.sites, named)
    if planned.config.train:
        check_statistics(survey, planned.config.train, present)
    for library in loaded_libraries():
        library.before_load(survey, name, wanted, _tied)
    return wanted


def _tied(place: Carried) -> Hashable:
    return memory_of(place.weight)
