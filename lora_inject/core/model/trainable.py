"""Which tensors of a model may train, what an optimizer gets, and whether a gradient reaches it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.library import loaded_libraries
from lora_inject.core.layers.packed_weights import loaded_kinds, reason_against
from lora_inject.core.layers.survey import Survey
from lora_inject.core.layers.weight_kinds import Reason
from lora_inject.core.roots.carried import check_names, entries, reach
from lora_inject.core.spec.names import joined
from lora_inject.errors import LayerError


def forget_gradients(frozen: Iterable[nn.Parameter]) -> None:
    """Clear the gradients of parameters that were frozen.

    An optimizer steps whatever has a gradient, whether or not it requires one.
    """
    for parameter in frozen:
        parameter.grad = None


# torch's own quantized layers, as `torch.ao.quantization.quantize_dynamic` makes them.
WITHOUT_AUTOGRAD = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")


def check_live_inputs(survey: Survey, asked: str) -> None:
    """Refuse to train where a layer hands no gradient to its input.

    Such layers compute without autograd: whatever lies before them would get a part of its
    gradient, or none.
    """
    for name, reason in _dead(survey):
        problem = f"its {reason.found}, through which no gradient reaches the layers before it"
        serves = "an adapter that was trained elsewhere can be loaded onto it"
        raise LayerError(f"{asked}, {name!r}", problem, f"{reason.remedy}; {serves}")


def trainable_tensors(
    survey: Survey, name: str | None = None
) -> Iterator[tuple[str, Entry, str, nn.Parameter]]:
    """Yield `(key, entry, role, Parameter)` of what may train of one adapter, or of all."""
    for library in loaded_libraries():
        library.before_read(survey)
    for path, module, entry in entries(survey, name):
        site = path if entry.spec is None else entry.spec.name
        for role, flat in entry.names.items():
            parameter = module._parameters[flat]
            if entry.trains(role) and parameter is not None:
                key = joined(path, entry.param) if role == "T" else f"{site}.lora_{role}"
                yield key, entry, role, parameter


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


def _dead(survey: Survey) -> Iterator[tuple[str, Reason]]:
    """Yield names of layers and weights that hand no gradient on, with the reason."""
    for path, module in survey.modules:
        if type(module).__module__.startswith(WITHOUT_AUTOGRAD):
            problem = f"{type(module).__name__} of torch.ao computes without autograd"
            yield path, Reason(problem, "Train first, then quantize")
    for path, module in survey.modules if loaded_kinds() else ():
        held: dict[str, Tensor | None] = {path: None}
        held |= {joined(path, key): weight for key, weight in survey.own[id(module)].items()}
        for name, weight in held.items():
            if (reason := reason_against("train", module, weight)) is not None:
                yield name, reason
