"""Which tensors of a model train, and what an optimiser gets of them.

An adapter's tensors require gradients where `train_only` named it, and the base never.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from lora_inject.errors import StateError
from lora_inject.layers.attached import TRAINABLE_ROLES
from lora_inject.layers.survey import Survey
from lora_inject.model.carried import check_names, entries, reach, refuse_merged
from lora_inject.spec.names import joined


def train_only(model: nn.Module, names: str | Iterable[str] | None) -> None:
    """Say which adapters require gradients; all others, and the base, do not.

    Args:
        model: The model.
        names: One adapter, several, or None for none.

    Raises:
        StateError: A name is unknown, or the model is merged.
    """
    wanted = {names} if isinstance(names, str) else set(names or ())
    found = reach(model)
    check_names(found.names, wanted, "train_only")
    for selection in found.selections:
        refuse_merged(selection, "train_only")
    set_trained(Survey(model), wanted)


def set_trained(survey: Survey, wanted: Collection[str]) -> None:
    """Set the `requires_grad` of every adapter's tensors, without a check."""
    for _, module, entry in entries(survey):
        for role, flat in entry.names.items():
            parameter = module._parameters[flat]
            if role in TRAINABLE_ROLES and parameter is not None:
                parameter.requires_grad_(entry.adapter in wanted)


def adapter_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """Return the trainable tensors of one adapter, or of all.

    Args:
        model: The model.
        name: The adapter. By default all of them, and then the keys begin with `NAME:` where there
            is more than one.

    Returns:
        `SITE.lora_A`, `SITE.lora_B` and the names of trained base tensors, to the Parameters. Ask
        again after `.to()` or sharding: those may put new Parameters in place.

    Raises:
        StateError: There is no such adapter.
    """
    known = reach(model).names
    check_names(known, [] if name is None else [name], "adapter_parameters of")
    found: dict[str, nn.Parameter] = {}
    for path, module, entry in entries(Survey(model), name):
        prefix = f"{entry.adapter}:" if name is None and len(known) > 1 else ""
        for role, flat in entry.names.items():
            if role not in TRAINABLE_ROLES:
                continue
            spec, parameter = entry.spec, module._parameters[flat]
            key = joined(path, entry.param) if spec is None else f"{spec.name}.lora_{role}"
            assert parameter is not None
            found[prefix + key] = parameter
    return found


def parameter_groups(model: nn.Module, lr: float, b_lr_ratio: float = 1.0) -> list[dict[str, Any]]:
    """Return optimiser groups over the trainable adapters.

    Args:
        model: The model.
        lr: Learning rate of A and of trained base tensors.
        b_lr_ratio: Learning rate of B over that of A; 16 is what LoRA+ (arXiv:2402.12354) advises.

    Returns:
        Groups with `params`, `lr` and a `name`, for any torch optimiser. Empty groups are left out.

    Raises:
        StateError: No adapter is trainable.
    """
    # By identity: the copy of a tied tensor stands under each of its names.
    groups: dict[str, dict[int, nn.Parameter]] = {"A": {}, "B": {}, "T": {}}
    for _, module, entry in entries(Survey(model)):
        for role, flat in entry.names.items():
            parameter = module._parameters[flat]
            if role in groups and parameter is not None and parameter.requires_grad:
                groups[role][id(parameter)] = parameter
    if not any(groups.values()):
        raise StateError(
            "parameter_groups",
            "no adapter of the model is trainable",
            "Call train_only(model, name)",
        )
    rates = {"A": lr, "B": lr * b_lr_ratio, "T": lr}
    return [
        {"params": list(parameters.values()), "lr": rates[role], "name": f"lora_{role}"}
        for role, parameters in groups.items()
        if parameters
    ]
