"""Groups for an optimizer, with a learning rate for each adapter and role."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor, nn

from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.trainable import check_live_inputs, trainable_tensors
from lora_inject.errors import StateError, check_type


def parameter_groups(
    model: nn.Module, lr: float | Mapping[str, float], b_lr_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Return optimizer groups over the trainable adapters.

    Args:
        model: The model.
        lr: Learning rate of A and of trained base tensors: one number, or one for each trainable
            adapter by its name.
        b_lr_ratio: Learning rate of B over that of A; 16 is what LoRA+ (arXiv:2402.12354) advises.

    Returns:
        Groups with `params`, `lr` and a `name`, for any torch optimizer: `lora_A`, `lora_B` and
        `lora_T`, or `NAME:lora_A` and so on where `lr` is given by adapter. Empty groups are left
        out.

    Raises:
        StateError: No adapter is trainable, `lr` does not name just those that are, a rate is
            negative or not a number, or the ratio is 0.
        LayerError: A quantized layer hands no gradient to its input.

    Examples:
        >>> from lora_inject.core.model.inject import inject
        >>> net = inject(nn.Sequential(nn.Linear(4, 4)), {"rank": 1, "targets": ["0"]}, "sql")
        >>> [(g["name"], g["lr"]) for g in parameter_groups(net, {"sql": 0.1}, b_lr_ratio=16)]
        [('sql:lora_A', 0.1), ('sql:lora_B', 1.6)]
    """
    survey = Survey(model)
    groups = _groups(survey, by_adapter=isinstance(lr, Mapping))
    if not groups:
        problem = "no adapter of the model is trainable"
        raise StateError("parameter_groups", problem, "Call train_only(model, name)")
    check_live_inputs(survey, "parameter_groups")  # a base may be quantized after inject
    rates = lr if isinstance(lr, Mapping) else {"": lr}
    _check_rates(rates, b_lr_ratio, {adapter for adapter, _ in groups})
    return [
        {
            "params": list(parameters.values()),
            "lr": rates[adapter] * (b_lr_ratio if role == "B" else 1.0),
            "name": f"{adapter}:lora_{role}" if adapter else f"lora_{role}",
        }
        for (adapter, role), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _groups(survey: Survey, *, by_adapter: bool) -> dict[tuple[str, str], dict[int, nn.Parameter]]:
    """Return what trains by adapter ("" for all together) and role, each Parameter once.

    By identity: the copy of a tied tensor stands under each of its names.
    """
    groups: dict[tuple[str, str], dict[int, nn.Parameter]] = {}
    for _, entry, role, parameter in trainable_tensors(survey):
        if parameter.requires_grad:
            key = (entry.adapter if by_adapter else "", role)
            groups.setdefault(key, {})[id(parameter)] = parameter
    return groups


def _check_rates(rates: Mapping[str, Any], ratio: Any, trainable: set[str]) -> None:
    """Check learning rates by adapter, and the ratio of B's: positive numbers, for each adapter."""
    for rate, what in [(ratio, "b_lr_ratio"), *((rate, "lr") for rate in rates.values())]:
        asked = f"parameter_groups, {what}"
        remedy = "Give a positive number, such as 1e-3"
        check_type(asked, rate, (Real, Tensor), remedy)
        # A rate of 0 is asked for in words; a ratio of 0 would leave B, and so the update, at 0.
        if not (0 < rate < math.inf or (what == "lr" and rate == 0)):
            raise StateError(asked, f"it is {rate}", remedy)
    if wrong := rates.keys() ^ trainable:
        asked = f"parameter_groups, learning rate of {min(wrong)!r}"
        problem = f"the trainable adapters are {sorted(trainable)}"
        raise StateError(asked, problem, "Give one for each of them and no other")
