"""Which tensors of a model may train, and whether a gradient reaches them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.packed_weights import loaded_kinds
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import entries
from lora_inject.core.model.guards import before
from lora_inject.core.spec.names import joined


def forget_gradients(frozen: Iterable[nn.Parameter]) -> None:
    """Clear the gradients of parameters that were frozen.

    An optimizer steps whatever has a gradient, whether or not it requires one.
    """
    for parameter in frozen:
        parameter.grad = None


# torch's own quantized layers, as `torch.ao.quantization.quantize_dynamic` makes them.
WITHOUT_AUTOGRAD = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")


def check_live_inputs(survey: Survey, asked: str) -> None:
    """Refuse to train where a layer hands no gradient to its input."""
    classes = {type(module) for _, module in survey.modules}
    if loaded_kinds() or any(cls.__module__.startswith(WITHOUT_AUTOGRAD) for cls in classes):
        from lora_inject.core.model.dead_inputs import refuse_dead_inputs

        refuse_dead_inputs(survey, asked, WITHOUT_AUTOGRAD)


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
