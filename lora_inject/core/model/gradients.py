"""Layers that hand no gradient on: what lies before them would train by a part of its gradient."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lora_inject.core.layers.library import loaded_kinds, reason_against, weight_kind
from lora_inject.core.layers.survey import Survey
from lora_inject.core.layers.weight_kinds import Reason, has_codes
from lora_inject.core.spec.names import joined
from lora_inject.errors import LayerError

# torch's own quantized layers, as `torch.ao.quantization.quantize_dynamic` makes them.
WITHOUT_AUTOGRAD = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")

# Buffers in which layers hold their packed weight; other buffers of integers are no weights.
_PACKED = ("weight", "qweight")


def check_live_inputs(survey: Survey, asked: str) -> None:
    """Refuse to train where a layer hands no gradient to its input, or may hand none.

    What is packed hands one on only if its kind says that it `trains`.
    """
    for name, reason in _dead(survey):
        problem = f"{reason.found}: no gradient reaches the layers before it"
        serves = "an adapter that was trained elsewhere can be loaded onto it"
        raise LayerError(f"{asked}, {name!r}", problem, f"{reason.remedy}; {serves}")


def _dead(survey: Survey) -> Iterator[tuple[str, Reason]]:
    """Yield names of layers and weights that hand no gradient on, with the reason."""
    kinds = loaded_kinds()
    for path, module in survey.modules:
        if type(module).__module__.startswith(WITHOUT_AUTOGRAD):
            problem = f"{type(module).__name__} of torch.ao computes without autograd"
            yield path, Reason(problem, "Train first, then quantize")
        if isinstance(module, nn.Embedding):  # whose input has no gradient
            continue
        if kinds and (reason := reason_against("train", module, None, kinds)) is not None:
            yield path, reason
        for key, weight in _held(module, survey.own[id(module)]):
            reason = reason_against("train", module, weight, kinds) if kinds else None
            if reason is None and has_codes(weight):
                reason = weight_kind(module, weight).why_not("train", module, weight)
            if reason is not None:
                yield joined(path, key), reason


def _held(module: nn.Module, own: dict[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """Yield the base tensors of a module that may be packed weights."""
    yield from own.items()
    for key, buffer in module._buffers.items():  # of a ScriptModule it is no dict
        if buffer is not None and key in _PACKED:
            yield key, buffer
