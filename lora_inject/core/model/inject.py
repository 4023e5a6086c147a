"""Putting a new adapter onto a live model, by a config."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.first_values import first_values
from lora_inject.core.layers.survey import Survey, memory_of
from lora_inject.core.model.attach import attach, survey_for
from lora_inject.core.model.carried import Carried
from lora_inject.core.model.guards import before, reasons_of_libraries
from lora_inject.core.model.in_full import check_statistics
from lora_inject.core.model.places import places
from lora_inject.core.model.trainable import check_live_inputs
from lora_inject.core.spec.config import Config, ConfigLike
from lora_inject.core.spec.inventory import Inventory
from lora_inject.core.spec.matching import resolve
from lora_inject.core.spec.plan import Plan
from lora_inject.core.spec.rooms import room
from lora_inject.errors import LayerError

M = TypeVar("M", bound=nn.Module)


def inject(
    model: M,
    config: ConfigLike,
    name: str = "default",
    *,
    probe: Callable[[], Any] | None = None,
    leave_new: bool = False,
    group: Any = None,
) -> M:
    """Put a new adapter onto a model, in place, and freeze everything else.

    The adapter becomes the only active and the only trainable one; others keep their values. That
    holds for another model's adapters as well if it shares a layer with this one. A further adapter
    goes onto the same module: one around or inside an injected one is refused. What is frozen
    loses its `grad`, which an optimizer that holds it would step by.

    Args:
        model: Any module; stays the same object.
        config: A `Config`, a dict, the path of a YAML file, or a `LoraConfig`.
        name: Name of the adapter.
        probe: Runs the model once, for instance `lambda: model(**batch)`. With it a site that the
            run does not reach, whose adapter would be inert, is an error.
        leave_new: Leave weights out that the model's checkpoint lacked, such as a new head, which
            have other values in each process. By default an adapter that does not `train` them is
            an error, where the library that loaded the model tells which they are.
        group: Processes of which each has other layers of the model, as the stages of a pipeline:
            a group of torch.distributed. Each calls this with its part. Patterns must match, and
            `expect` must hold, over all parts; a part may get nothing. All raise, or none.

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
    if group is not None:
        room("stages").inject_by_all(group, model, config, name, probe, leave_new=leave_new)
        return model
    survey, present = surveyed(model, name)
    planned = resolve(Config.coerce(config, present, model), present, to_show=False)
    wanted = places_of_plan(survey, name, planned, present, leave_new=leave_new)
    put_plan_on(survey, name, planned, wanted, probe)
    return model


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
            return room("gathering").first_values_alike(survey, place)  # type: ignore[no-any-return]
        return first_values(place.module, place.entry, place.weight)

    def last() -> None:
        if probe is not None:
            room("reached").refuse_unreached(survey.model, probe)
        agreed()

    attach(survey, name, wanted, initial, _tied, planned.config.to_dict(), last=last)


def places_of_plan(
    survey: Survey, name: str, planned: Plan, present: Inventory, *, leave_new: bool
) -> list[Carried]:
    """Return where the sites and trained tensors of a plan go; everything can take them."""
    for problem, remedy in reasons_of_libraries(survey, planned, leave_new=leave_new):
        raise LayerError(f"inject {name!r}", problem, remedy)
    named = {
        key: trained.rows for trained in planned.trained for key in survey.names_of(trained.name)
    }
    wanted = places(survey, name, planned.sites, named)
    if planned.config.train:
        check_statistics(survey, planned.config.train, present)
    before("load", survey, name, wanted, _tied)
    return wanted


def _tied(place: Carried) -> Hashable:
    return memory_of(place.weight)
