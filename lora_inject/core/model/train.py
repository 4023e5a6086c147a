"""Which adapters of a model train: those that `train_only` named, and the base never."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch import nn

from lora_inject.core.functional.torch_inside import forget_graphs
from lora_inject.core.layers.library import loaded_libraries
from lora_inject.core.layers.packed_weights import begin_training
from lora_inject.core.layers.snapshot import all_or_nothing
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.trainable import (
    check_live_inputs,
    forget_gradients,
    trainable_tensors,
)
from lora_inject.core.roots.carried import (
    adapted_modules,
    alone,
    check_names,
    check_unmerged,
    reach,
    records_of,
)
from lora_inject.errors import check_type

M = TypeVar("M", bound=nn.Module)


@alone
def train_only(model: M, names: str | Iterable[str] | None) -> M:
    """Say which adapters require gradients; all others, and the base, do not.

    What it freezes loses its `grad`, which an optimizer that holds it would step by.

    Args:
        model: The model.
        names: One adapter, several, or None for none.

    Returns:
        The same object.

    Raises:
        StateError: A name is unknown, or the model is merged.
        LayerError: A quantized layer hands no gradient to its input; or the model was wrapped in
            DistributedDataParallel while one of these did not train.

    Examples:
        >>> from lora_inject.core.model.inject import inject
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("sql", "style"):
        ...     _ = inject(net, {"rank": 1, "targets": ["0"]}, name)
        >>> _ = train_only(net, "sql")
        >>> [key for key, parameter in net.named_parameters() if parameter.requires_grad]
        ['0.lora_A__sql', '0.lora_B__sql']
    """
    wanted = _adapters_named(model, names)
    survey = Survey(model)
    if wanted:
        check_live_inputs(survey, f"train_only {min(wanted)!r}")
    asked = f"train_only {', '.join(map(repr, sorted(wanted)))}"
    flags = [(p, entry.adapter in wanted) for _, entry, _, p in trainable_tensors(survey)]
    training = [parameter for parameter, trains in flags if trains]
    for library in loaded_libraries():
        library.before_train(survey, training, asked)
    records = [record for name in wanted for _, record in records_of(survey, name)]
    with all_or_nothing((module for _, module, _ in adapted_modules(survey)), records):
        changed = _set_flags(flags)
        if wanted:
            begin_training(module for _, module in survey.modules)
        for record in records:
            record.trainable |= wanted & record.carrying.keys()
    forget_gradients(parameter for parameter, trains in flags if not trains)
    if changed:
        forget_graphs()
    return model


def _set_flags(flags: Sequence[tuple[nn.Parameter, bool]]) -> bool:
    """Let parameters train or not; return whether that changed any."""
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
    check_unmerged("train_only", *there.selections)
    return wanted
