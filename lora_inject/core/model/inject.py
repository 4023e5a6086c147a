"""Putting a new adapter onto a live model, by a config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from lora_inject.core.model.put import places_of_plan, put_plan_on, surveyed
from lora_inject.core.model.stages import inject_by_all
from lora_inject.core.spec.config import ConfigLike
from lora_inject.core.spec.resolve import resolve
from lora_inject.formats.from_peft import config_of

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
        inject_by_all(group, model, config, name, probe, leave_new=leave_new)
        return model
    survey, present = surveyed(model, name)
    planned = resolve(config_of(config, present, model), present, to_show=False)
    wanted = places_of_plan(survey, name, planned, present, leave_new=leave_new)
    put_plan_on(survey, name, planned, wanted, probe)
    return model
