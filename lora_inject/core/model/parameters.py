"""What an optimizer gets of the adapters on a model."""

from __future__ import annotations

from torch import nn

from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import check_names, reach
from lora_inject.core.model.trainable import trainable_tensors


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
