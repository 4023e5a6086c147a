"""Putting a new adapter onto a live model, by a config; and saying before what that would do."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.library import loaded_libraries
from lora_inject.core.layers.starting import first_values
from lora_inject.core.layers.survey import Carried, Survey, memory_of
from lora_inject.core.model.gradients import check_live_inputs
from lora_inject.core.model.places import places
from lora_inject.core.model.put import check_takes_adapter, put, survey_for, uncollected
from lora_inject.core.model.used import refuse_unreached
from lora_inject.core.spec.config import ConfigLike
from lora_inject.core.spec.inventory import Inventory
from lora_inject.core.spec.plan import Plan
from lora_inject.core.spec.resolve import resolve
from lora_inject.errors import LayerError, LoraInjectError
from lora_inject.formats.from_peft import config_of
from lora_inject.formats.live_models import notes_on_files

M = TypeVar("M", bound=nn.Module)


@uncollected()
def plan(model: nn.Module, config: ConfigLike, name: str = "default") -> Plan:
    r"""Say what `inject` would do, and change nothing.

    What `inject` would refuse of the model, and not of the config, is a note of the plan.

    Args:
        model: Any module, also on the meta device.
        config: A `Config`, a dict, the path of a YAML file, or a `LoraConfig`.
        name: Name of the adapter.

    Returns:
        The plan; `print(plan)` shows it as a table.

    Raises:
        ConfigError: The config is not valid.
        MatchError: A pattern matches nothing, or `expect` is missed.
        LayerError: A matched module cannot carry an adapter.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plan(net, {"rank": 2, "targets": [r"\d"]}).n_lora
        44
    """
    survey, notes = Survey(model), list[str]()

    @contextmanager
    def noting() -> Iterator[None]:
        try:
            yield
        except LoraInjectError as error:
            notes.append(f"inject would refuse this: {error}")

    planned, present, _ = _wanted(survey, config, name, noting, leave_new=False, to_show=True)
    notes += notes_on_files(survey, planned.sites, present.listed)
    return replace(planned, notes=(*planned.notes, *notes))


def inject(
    model: M,
    config: ConfigLike,
    name: str = "default",
    *,
    probe: Callable[[], Any] | None = None,
    leave_new: bool = False,
) -> M:
    """Put a new adapter onto a model, in place, and freeze everything else.

    The adapter becomes the only active and the only trainable one; others keep their values. A
    further adapter goes onto the same module: one around or inside an injected one is refused, and
    so are layers that another injected model has. What is frozen loses its `grad`, which an
    optimizer that holds it would step by.

    Args:
        model: Any module; stays the same object.
        config: A `Config`, a dict, the path of a YAML file, or a `LoraConfig`.
        name: Name of the adapter.
        probe: Runs the model once, for instance `lambda: model(**batch)`. With it a site that the
            run does not reach, whose adapter would be inert, is an error.
        leave_new: Leave weights out that the model's checkpoint lacked, such as a new head, which
            have other values in each process. By default an adapter that does not `train` them is
            an error, where the library that loaded the model tells which they are.

    Returns:
        The same object, for chaining.

    Raises:
        ConfigError: The config is not valid.
        MatchError: A pattern matches nothing, or `expect` is missed.
        LayerError: A matched module cannot carry an adapter, or `probe` does not reach it; or new
            weights would be left out.
        StateError: The name is in use, the model is merged, or it lies around or inside of an
            injected one.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = inject(net, {"rank": 2, "targets": ["0"]})
        >>> sorted(n for n, p in net.named_parameters() if p.requires_grad)
        ['0.lora_A__default', '0.lora_B__default']
    """

    def last() -> None:
        if probe is not None:
            refuse_unreached(model, probe)

    put_config(model, config, name, leave_new=leave_new, last=last)
    return model


@uncollected()
def put_config(
    model: nn.Module,
    config: ConfigLike,
    name: str,
    *,
    leave_new: bool,
    alone: bool = True,
    last: Callable[[], None] = lambda: None,
) -> None:
    """Put a new adapter on by a config; see `inject`, and `put` for what is not `alone`."""
    survey, raising = survey_for(model), nullcontext
    planned, _, wanted = _wanted(survey, config, name, raising, leave_new=leave_new, to_show=False)
    copies: dict[Hashable, Mapping[str, Tensor]] = {}

    def values(place: Carried) -> Mapping[str, Tensor]:
        if place.entry.spec is not None:
            return _first_values(place)
        memory = memory_of(place.weight)  # a tied tensor has one copy
        if memory not in copies:
            copies[memory] = _first_values(place)
        return copies[memory]

    put(survey, name, wanted, values, planned.config.to_dict(), alone=alone, last=last)


def _wanted(
    survey: Survey,
    config: ConfigLike,
    name: str,
    refusing: Callable[[], AbstractContextManager[None]],
    *,
    leave_new: bool,
    to_show: bool,
) -> tuple[Plan, Inventory, list[Carried]]:
    """Return what a config asks for, of which names, and where it goes.

    What is refused because of the model, and not of the config, is raised inside `refusing()`.
    """
    asked, wanted = f"inject {name!r}", list[Carried]()
    with refusing():
        check_takes_adapter(survey, name, trains=True)
    present = inventory(survey)
    planned = resolve(config_of(config, present, survey.given), present, to_show=to_show)
    for library in loaded_libraries():
        for problem, remedy in library.against(survey, planned, leave_new=leave_new):
            with refusing():
                raise LayerError(asked, problem, remedy)
    with refusing():
        rows = {key: each.rows for each in planned.trained for key in survey.names_of(each.name)}
        wanted += places(survey, name, planned.sites, rows)
    with refusing():
        check_live_inputs(survey, asked, (place.path for place in wanted))
    return planned, present, wanted


def _first_values(place: Carried) -> Mapping[str, Tensor]:
    """Return the values that a new adapter starts with at a layer.

    On a layer that FSDP2 has sharded they are whole, and in every process those of the first one.
    """
    values = first_values(place.module, place.entry, place.weight)
    mesh: Any = getattr(place.weight, "device_mesh", None)
    for axis in range(0 if mesh is None else mesh.ndim):
        group = mesh.get_group(axis)
        source = torch.distributed.get_global_rank(group, 0)
        for tensor in values.values():
            torch.distributed.broadcast(tensor, source, group)
    return values
