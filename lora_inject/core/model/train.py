"""Which tensors of a model train, and what an optimizer gets of them.

An adapter's tensors require gradients where `train_only` named it, and the base never.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor, nn

from lora_inject.core.functional.inside import forget_graphs
from lora_inject.core.layers.packed_weights import begin_training
from lora_inject.core.layers.snapshot import all_or_nothing
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import (
    adapted_modules,
    check_names,
    reach,
    records_of,
    refuse_merged,
)
from lora_inject.core.model.guards import before
from lora_inject.core.model.trainable import (
    forget_gradients,
    refuse_dead_inputs,
    trainable_tensors,
)
from lora_inject.errors import StateError, check_type


def train_only(model: nn.Module, names: str | Iterable[str] | None) -> None:
    """Say which adapters require gradients; all others, and the base, do not.

    What it freezes loses its `grad`, which an optimizer that holds it would step by.

    Args:
        model: The model.
        names: One adapter, several, or None for none.

    Raises:
        StateError: A name is unknown, or the model is merged.
        LayerError: A quantized layer hands no gradient to its input; or the model was wrapped in
            DistributedDataParallel while one of these did not train.
    """
    wanted = _adapters_named(model, names)
    survey = Survey(model)
    if wanted:
        refuse_dead_inputs(survey, f"train_only {min(wanted)!r}")
    asked = f"train_only {', '.join(map(repr, sorted(wanted)))}"
    may_train = [(entry.adapter, p) for _, entry, _, p in trainable_tensors(survey)]
    trained = [parameter for adapter, parameter in may_train if adapter in wanted]
    frozen = [parameter for adapter, parameter in may_train if adapter not in wanted]
    before("train", survey, trained, asked)
    records = [record for name in wanted for _, record in records_of(survey, name)]
    with all_or_nothing((module for _, module, _ in adapted_modules(survey)), records):
        changed = _set_flags(trained, frozen)
        if wanted:
            begin_training(module for _, module in survey.modules)
        for record in records:
            record.trainable |= wanted & record.carrying.keys()
    forget_gradients(frozen)
    if changed:
        forget_graphs()


def _set_flags(trained: Sequence[nn.Parameter], frozen: Sequence[nn.Parameter]) -> bool:
    """Let some parameters train and no others; return whether that changed any."""
    flags = [(parameter, True) for parameter in trained]
    flags += [(parameter, False) for parameter in frozen]
    changed = any(parameter.requires_grad != trains for parameter, trains in flags)
    for parameter, trains in flags:
        parameter.requires_grad_(trains)
    return changed


def _adapters_named(model: nn.Module, names: str | Iterable[str] | None) -> set[str]:
    """Return the names of adapters that may train now."""
    listed: Any = [] if names is None else names
    if isinstance(names, str):
        listed = [names]
    check_type("train_only", listed, Iterable, "Give a name, several, or None")
    there = reach(model)
    wanted = check_names(there.names, listed, "train_only")
    refuse_merged("train_only", *there.selections)
    return wanted


def adapter_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """Return the trainable tensors of one adapter, or of all.

    Args:
        model: The model.
        name: The adapter. By default all of them, and then the keys begin with `NAME:` where there
            is more than one.

    Returns:
        `SITE.lora_A`, `SITE.lora_B` and the names of trained base tensors, to the Parameters, each
        once: the copy of a tied tensor under its first name. `torch.func` needs the names of
        `model.named_parameters()`. Ask again after `.to()` or sharding: those may put new
        Parameters in place.

    Raises:
        StateError: There is no such adapter.
    """
    known = reach(model).names
    check_names(known, [] if name is None else [name], "adapter_parameters of")
    several = name is None and len(known) > 1
    # By identity: an optimizer would step a Parameter that is given twice twice.
    parameters = dict[int, tuple[str, nn.Parameter]]()
    for key, entry, _, parameter in trainable_tensors(Survey(model), name):
        parameters.setdefault(
            id(parameter), (f"{entry.adapter}:{key}" if several else key, parameter)
        )
    return dict(parameters.values())


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
    refuse_dead_inputs(survey, "parameter_groups")  # a base may be quantized after inject
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
        asked, remedy = f"parameter_groups, {what}", "Give a positive number, such as 1e-3"
        check_type(asked, rate, (Real, Tensor), remedy)
        # A rate of 0 is asked for in words; a ratio of 0 would leave B, and so the update, at 0.
        if not (0 < rate < math.inf or (what == "lr" and rate == 0)):
            raise StateError(asked, f"it is {rate}", remedy)
    if wrong := rates.keys() ^ trainable:
        asked = f"parameter_groups, learning rate of {min(wrong)!r}"
        problem = f"the trainable adapters are {sorted(trainable)}"
        raise StateError(asked, problem, "Give one for each of them and no other")
