"""Which tensors of a model may train, and whether a gradient reaches them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.packed_weights import loaded_kinds, reason_against
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import entries
from lora_inject.core.model.guards import before
from lora_inject.core.spec.names import joined
from lora_inject.errors import LayerError

if TYPE_CHECKING:
    from lora_inject.core.layers.weight_kinds import Reason


def forget_gradients(frozen: Iterable[nn.Parameter]) -> None:
    """Clear the gradients of parameters that were frozen.

    An optimizer steps whatever has a gradient, whether or not it requires one.
    """
    for parameter in frozen:
        parameter.grad = None


def check_live_inputs(survey: Survey, asked: str) -> None:
    """Refuse to train where a layer hands no gradient to its input.

    Such layers compute without autograd: whatever lies before them would get a part of its
    gradient, or none.
    """
    for name, reason in _dead(survey):
        problem = f"its {reason.found}, through which no gradient reaches the layers before it"
        serves = "an adapter that was trained elsewhere can be loaded onto it"
        raise LayerError(f"{asked}, {name!r}", problem, f"{reason.remedy}; {serves}")


# torch's own quantized layers, as `torch.ao.quantization.quantize_dynamic` makes them.
_WITHOUT_AUTOGRAD = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")


def _dead(survey: Survey) -> Iterator[tuple[str, Reason]]:
    """Yield names of layers and weights that hand no gradient on, with the reason."""
    for path, module in survey.modules:
        if type(module).__module__.startswith(_WITHOUT_AUTOGRAD):
            from lora_inject.core.layers.weight_kinds import Reason

            problem = f"{type(module).__name__} of torch.ao computes without autograd"
            yield path, Reason(problem, "Train first, then quantize")
    for path, module in survey.modules if loaded_kinds() else ():
        held: dict[str, Tensor | None] = {path: None}
        held |= {joined(path, key): weight for key, weight in survey.own[id(module)].items()}
        for name, weight in held.items():
            if (reason := reason_against("train", module, weight)) is not None:
                yield name, reason


def trainable_tensors(
    survey: Survey, name: str | None = None
) -> Iterator[tuple[str, Entry, str, nn.Parameter]]:
    """Yield `(key, entry, role, Parameter)` of what may train of one adapter, or of all."""
    before("read", survey)
    for path, module, entry in entries(survey, name):
        site = path if entry.spec is None else entry.spec.name
        for role, flat in entry.names.items():
            parameter = module._parameters[flat]
            if entry.trains(role) and parameter is not None:
                key = joined(path, entry.param) if role == "T" else f"{site}.lora_{role}"
                yield key, entry, role, parameter
