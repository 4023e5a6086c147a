"""bitsandbytes: NF4, FP4 and int8, in layers of its own classes.

On a CPU its 4-bit layers rearrange their codes in an evaluation, for a kernel without a backward
pass, and leave them so (0.50, `bitsandbytes/nn/modules.py: Linear4bit.forward`): training that goes
on would silently get wrong gradients. So no codes are rearranged while adapters train.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.adapter.fingerprint import glimpse
from lora_inject.core.layers.adapted import plain_class
from lora_inject.core.layers.weight_kinds import OF_VALUES, Reason, Undo, Verb
from lora_inject.quantized.plain_layers import Layer, LayerKind, become_plain

_MODULE = "bitsandbytes.nn.modules"
_PACKS = "support_avx512bf16_for_cpu"  # the flag of a layer that would be rearranged
_OURS = ""  # as false as False, and says whose it is


class _OfBitsAndBytes(LayerKind):
    """What both formats have in common: the layer's class is bitsandbytes' own."""

    forwards = ((_MODULE, "Linear4bit"), (_MODULE, "Linear8bitLt"))
    trains = True  # bitsandbytes/autograd/_functions.py: MatMul4Bit, MatMul8bitLt, MatMul8bitFp

    def write(self, module: nn.Module, key: str, weight: nn.Parameter) -> Undo:
        """Replace the layer by a plain one, or its weight by another in the same format."""
        if type(weight) is nn.Parameter:
            return become_plain(module, weight)
        before, own = Layer.of(module), module.__dict__
        if (state := own.get("state")) is not None:  # of int8: as before its first forward
            before.attributes["state"] = state
            own["state"] = fresh = copy.copy(state)
            fresh.CB = fresh.SCB = None
        if "quant_state" in own:
            before.attributes["quant_state"] = own["quant_state"]
            own["quant_state"] = getattr(weight, "quant_state", None)
        module._parameters[key] = weight
        return before

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why a layer of another class cannot be unpacked."""
        plain = plain_class(type(module))
        if verb in OF_VALUES and plain.__module__ != _MODULE:
            problem = f"dequantizing a {plain.__name__} of {plain.__module__} is not supported"
            return Reason(problem)
        return super().why_not(verb, module, weight)


class BitsAndBytes4(_OfBitsAndBytes):
    """NF4 and FP4: `Params4bit` with its `quant_state`."""

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the tensor is bitsandbytes' and has a state."""
        ours = type(weight).__module__ == _MODULE
        return ours and getattr(weight, "quant_state", None) is not None

    def dense(self, module: nn.Module, weight: Any) -> Tensor:
        """Return the values; inference on some CPUs has rearranged codes and scales."""
        from bitsandbytes.functional import dequantize_4bit

        state = copy.copy(weight.quant_state)
        if getattr(state, "packing_format_for_cpu", False):
            state.absmax, state.nested = state.absmax.t().reshape(-1).float(), False
        values: Tensor = dequantize_4bit(codes_of(weight.data, weight.quant_state), state)
        return values

    @torch.no_grad()
    def packed(self, module: nn.Module, weight: Any, values: Tensor) -> nn.Parameter:
        """Return values in blocks and with scales as `weight` has them."""
        from bitsandbytes.functional import quantize_4bit
        from bitsandbytes.nn.modules import Params4bit

        layer: Any = module
        keys = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        how = {key: getattr(weight, key) for key in keys}
        data, state = quantize_4bit(values, **how)
        state.dtype = getattr(weight.quant_state, "original_dtype", weight.quant_state.dtype)
        made: nn.Parameter = Params4bit(
            data, requires_grad=False, quant_state=state, module=layer, bnb_quantized=True, **how
        )
        return made

    def described(self, weight: Any) -> Iterator[str] | None:
        """Return the format, the size of a block, the shape and a few codes."""
        state = getattr(weight, "quant_state", None)
        return None if state is None else _described(weight, state)

    def begin_training(self, module: nn.Module) -> None:
        """Rearrange no codes for inference from now on, and undo it where it was done.

        What scales lost by it when they were rounded to bfloat16 is not restored.
        """
        own: Any = module.__dict__
        if not own.get(_PACKS):
            return
        own[_PACKS] = _OURS
        weight: Any = own["_parameters"]["weight"]
        state: Any = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            weight.data = codes_of(weight.data, state)
            state.absmax, state.nested = state.absmax.t().reshape(-1).float(), False
            state.dtype, state.packing_format_for_cpu = state.original_dtype, False

    def end_training(self, module: nn.Module) -> None:
        """Give a layer what it said itself."""
        if module.__dict__.get(_PACKS) == _OURS:
            module.__dict__[_PACKS] = True


class BitsAndBytes8(_OfBitsAndBytes):
    """LLM.int8(): `Int8Params`, whose scales the first forward moves to the layer."""

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the tensor is bitsandbytes' and has no state of 4 bits."""
        ours = type(weight).__module__ == _MODULE
        return ours and getattr(weight, "quant_state", None) is None

    def dense(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Return codes times the scale of their row."""
        rows: Any = _row_scales(module, weight)
        values: Tensor = weight.data.float() * (rows.float() / 127)[:, None]
        return values

    @torch.no_grad()
    def packed(self, module: nn.Module, weight: Tensor, values: Tensor) -> nn.Parameter:
        """Return values with a scale for each row."""
        from bitsandbytes.functional import int8_vectorwise_quant
        from bitsandbytes.nn.modules import Int8Params

        codes, scales, _ = int8_vectorwise_quant(values.to(torch.float16))
        made: nn.Parameter = Int8Params(
            codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales
        )
        return made

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why a weight has no values yet: it is quantized when it is moved to a device."""
        reason = super().why_not(verb, module, weight)
        if reason is not None or verb not in OF_VALUES:
            return reason
        if weight is None or weight.dtype != torch.int8 or _row_scales(module, weight) is None:
            return Reason("bitsandbytes has not quantized it yet")
        return None


def codes_of(data: Tensor, state: Any) -> Tensor:
    """Return 4-bit codes as they are stored in files; inference on some CPUs rearranges them."""
    if not getattr(state, "packing_format_for_cpu", False):
        return data
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    codes: Tensor = _convert_weight_packed_for_cpu_inverse(data, copy.copy(state))[0]
    return codes


def _described(weight: Tensor, state: Any) -> Iterator[str]:
    yield f"{state.quant_type}, blocks of {state.blocksize}, {tuple(state.shape)}"
    yield glimpse(codes_of(weight.data, state).reshape(-1).view(torch.uint8))


def _row_scales(module: nn.Module, weight: Any) -> Tensor | None:
    """Return the scales of int8 rows, wherever they are now."""
    scales: Tensor | None = getattr(weight, "SCB", None)
    return scales if scales is not None else getattr(getattr(module, "state", None), "SCB", None)
