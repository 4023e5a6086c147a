"""Layers that compute without autograd, before which nothing can train."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lora_inject.core.layers.packed_weights import loaded_kinds, reason_against
from lora_inject.core.layers.survey import Survey
from lora_inject.core.layers.weight_kinds import Reason
from lora_inject.core.spec.names import joined
from lora_inject.errors import LayerError


def refuse_dead_inputs(survey: Survey, asked: str, classes: tuple[str, ...]) -> None:
    """Refuse to train where a layer hands no gradient to its input.

    Such layers, among them torch's own `classes`, compute without autograd: whatever lies before
    them would get a part of its gradient, or none.
    """
    for name, reason in _dead(survey, classes):
        problem = f"its {reason.found}, through which no gradient reaches the layers before it"
        serves = "an adapter that was trained elsewhere can be loaded onto it"
        raise LayerError(f"{asked}, {name!r}", problem, f"{reason.remedy}; {serves}")


def _dead(survey: Survey, classes: tuple[str, ...]) -> Iterator[tuple[str, Reason]]:
    """Yield names of layers and weights that hand no gradient on, with the reason."""
    for path, module in survey.modules:
        if type(module).__module__.startswith(classes):
            problem = f"{type(module).__name__} of torch.ao computes without autograd"
            yield path, Reason(problem, "Train first, then quantize")
    for path, module in survey.modules if loaded_kinds() else ():
        held: dict[str, Tensor | None] = {path: None}
        held |= {joined(path, key): weight for key, weight in survey.own[id(module)].items()}
        for name, weight in held.items():
            if (reason := reason_against("train", module, weight)) is not None:
                yield name, reason
