"""Quantized weights of a live model: replaced in their layers, and kept in a form that trains.

A layer stays the same object. Its weight, and the class of a bitsandbytes layer, are replaced;
`Layer` restores the original objects.

On a CPU bitsandbytes' 4-bit layers rearrange their codes in an evaluation, for a kernel without a
backward pass, and leave them so (0.50, `bitsandbytes/nn/modules.py: Linear4bit.forward`): training
that goes on would silently get wrong gradients. So no codes are rearranged while adapters train.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.checks.fingerprint import codes_of
from lora_inject.core.layers.adapted import plain_class
from lora_inject.core.layers.class_swap import change_plain_class
from lora_inject.core.layers.reading import is_quantized
from lora_inject.core.layers.survey import Holder, Survey, base_parameters, base_tensor
from lora_inject.core.spec.names import joined
from lora_inject.errors import LayerError
from lora_inject.experts.packed_experts import PackedExperts
from lora_inject.quantized.dense_values import kind_of_weight, packed_weight

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What transformers leaves on a quantized model and on its config.
_ON_MODEL = ("hf_quantizer", "is_quantized", "quantization_method")
# Attributes that others leave on a layer, whatever its class: hooks, adapters.
_KEPT = ("forward", "_lora", "_hf_", "_old_forward", "_is_")
_ON_CONFIG = ("quantization_config", "_pre_quantization_dtype", "_is_quantized")
_PACKS = "support_avx512bf16_for_cpu"  # the flag of a layer that would be rearranged
_OURS = ""  # as false as False, and says whose it is


def dtype_of(dequantize: str | torch.dtype) -> torch.dtype:
    """Return the dtype of a name."""
    name = str(dequantize).removeprefix("torch.")
    if name not in DTYPES:
        remedy = f"Use one of {list(DTYPES)}"
        raise LayerError(f"dequantize={name!r}", "the dtype is not known", remedy)
    return DTYPES[name]


@torch.no_grad()
def quantized_again(module: nn.Module, weight: Tensor, values: Tensor) -> nn.Parameter:
    """Return a weight in the format of another one, for float32 values of its layer."""
    from bitsandbytes import functional
    from bitsandbytes.nn.modules import Int8Params, Params4bit

    held: Any = weight
    layer: Any = module
    if kind_of_weight(module, weight) == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(values.to(torch.float16))
        return Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    how = {key: getattr(held, key) for key in ("blocksize", "compress_statistics", "quant_type")}
    how["quant_storage"] = held.quant_storage
    data, state = functional.quantize_4bit(values, **how)
    state.dtype = getattr(held.quant_state, "original_dtype", held.quant_state.dtype)
    made: nn.Parameter = Params4bit(
        data, requires_grad=False, quant_state=state, module=layer, bnb_quantized=True, **how
    )
    return made


def quantized_weights(survey: Survey) -> Iterator[Holder]:
    """Yield every layer that holds a quantized weight of a library, and the weight's name."""
    for path, module in survey.modules:
        if (name := packed_weight(plain_class(type(module)))) and name in module._buffers:
            yield Holder(joined(path, name), module, name)
    for holder in survey.holders:
        weight = holder.tensor
        packed = (
            type(weight) is not nn.Parameter or kind_of_weight(holder.module, weight) is not None
        )
        if packed and is_quantized(weight):
            yield holder


def _becomes_linear(module: nn.Module, weight: Tensor) -> bool:
    """Whether the class of a layer is its quantizer's; torchao exchanges weights alone."""
    if kind_of_weight(module, weight) != "tensor":
        return True
    classes = (plain_class(type(module)), type(weight))
    return len({cls.__module__.partition(".")[0] for cls in classes}) == 1


def refuse_fixed_class(module: nn.Module, weight: Tensor, asked: str) -> None:
    """Check that a layer can become an `nn.Linear` if it must: Python allows the class."""
    plain: Any = plain_class(type(module))
    try:
        if _becomes_linear(module, weight):
            plain.__new__(plain).__class__ = nn.Linear
    except TypeError:
        raise LayerError(
            asked,
            f"the weight is quantized, and its {plain.__name__} of {plain.__module__} has a memory "
            "layout of its own and cannot become an nn.Linear",
            "Load dict(merged_weights(model, dequantize=...)) into the base in 16 bits",
        ) from None


@dataclass
class Layer:
    """The state of a layer before its quantized weight was replaced."""

    module: nn.Module
    plain: type[nn.Module]
    attributes: dict[str, Any]
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]

    def put_back(self) -> None:
        """Give the layer its own class, attributes, Parameters and buffers back."""
        change_plain_class(self.module, self.plain)
        self.module.__dict__.update(self.attributes)
        self.module._parameters.clear()
        self.module._parameters.update(self.parameters)
        self.module._buffers.update(self.buffers)


def replace_weight(module: nn.Module, key: str, weight: nn.Parameter) -> Layer:
    """Replace the weight of a quantized layer.

    With a plain one it becomes an `nn.Linear`, whose Parameters are `weight` and `bias`.
    """
    plain, own = plain_class(type(module)), module.__dict__
    before = Layer(module, plain, {}, dict(module._parameters), dict(module._buffers))
    if isinstance(base_tensor(module, key), PackedExperts):
        module._parameters[key] = weight
        return before
    if type(weight) is not nn.Parameter:  # in the same format
        if (state := own.get("state")) is not None:  # of int8: as before its first forward
            before.attributes["state"] = state
            own["state"] = fresh = copy.copy(state)
            fresh.CB = fresh.SCB = None
        if "quant_state" in own:
            before.attributes["quant_state"] = own["quant_state"]
            own["quant_state"] = getattr(weight, "quant_state", None)
        module._parameters[key] = weight
        return before
    alone, common = {"extra_repr"}, _linear_attributes()  # torchao's
    changes = _becomes_linear(module, base_tensor(module, key))
    if changes and issubclass(plain, nn.Linear):
        with torch.device("meta"):
            alone = plain(1, 1).__dict__.keys() - common
    elif changes:
        alone = {name for name in own if not name.startswith(_KEPT)} - common
    base = base_parameters(module)
    adapters = {name: p for name, p in module._parameters.items() if name not in base}
    held: dict[str, Any] = {**before.buffers, **before.parameters}
    bias = own["bias"] if "bias" in alone else held.get("bias")
    if bias is not None and (type(bias) is Tensor or bias.dtype != weight.dtype):
        bias = nn.Parameter(bias.detach().to(weight.dtype), bias.requires_grad)
    if changes:
        change_plain_class(module, nn.Linear)
    before.attributes = {name: own.pop(name) for name in sorted(alone & own.keys())}
    module._parameters.clear()
    module._parameters.update({"weight": weight, "bias": bias, **adapters})
    if changes:
        module._buffers.clear()
    return before


@cache
def _linear_attributes() -> frozenset[str]:
    with torch.device("meta"):
        return frozenset(nn.Linear(1, 1).__dict__)


def said_quantized(survey: Survey) -> list[tuple[Any, dict[str, Any]]]:
    """Return the models and configs that say they are quantized, with the attributes that do."""
    owners: list[tuple[Any, tuple[str, ...]]] = []
    for _, module in survey.modules:
        if "hf_quantizer" in module.__dict__:
            owners += [(module, _ON_MODEL), (getattr(module, "config", None), _ON_CONFIG)]
    return [
        (owner, {name: owner.__dict__[name] for name in names if name in owner.__dict__})
        for owner, names in owners
        if owner is not None
    ]


def forbid_packing(modules: Iterable[nn.Module]) -> None:
    """Rearrange no codes for inference from now on, and undo it where it was done.

    What scales lost by it when they were rounded to bfloat16 is not restored.
    """
    for module in modules:
        own: Any = module.__dict__
        if not own.get(_PACKS):
            continue
        own[_PACKS] = _OURS
        weight: Any = own["_parameters"]["weight"]
        state: Any = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            weight.data = codes_of(weight.data, state)
            state.absmax, state.nested = state.absmax.t().reshape(-1).float(), False
            state.dtype, state.packing_format_for_cpu = state.original_dtype, False


def allow_packing(modules: Iterable[nn.Module]) -> None:
    """Give layers what they said themselves."""
    for module in modules:
        if module.__dict__.get(_PACKS) == _OURS:
            module.__dict__[_PACKS] = True
