"""bitsandbytes' 4-bit layers on a CPU keep codes that have a backward pass while adapters train.

An evaluation rearranges a layer's codes for a kernel for inference without one, and leaves them so
(0.50, `bitsandbytes/nn/modules.py: Linear4bit.forward`): training that goes on would silently get
wrong gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lora_inject.adapter.fingerprint import codes_of

FLAG = "support_avx512bf16_for_cpu"
# As false as False, and says whose it is.
_OURS = ""


def forbid_packing(modules: Iterable[nn.Module]) -> None:
    """Rearrange no codes for inference from now on, and undo it where it was done.

    What scales lost by it when they were rounded to bfloat16 is not restored.
    """
    for module in modules:
        own: Any = module.__dict__
        if not own.get(FLAG):
            continue
        own[FLAG] = _OURS
        weight: Any = own["_parameters"]["weight"]
        state: Any = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            weight.data = codes_of(weight.data, state)
            state.absmax, state.nested = state.absmax.t().reshape(-1).float(), False
            state.dtype, state.packing_format_for_cpu = state.original_dtype, False


def allow_packing(modules: Iterable[nn.Module]) -> None:
    """Give layers what they said themselves."""
    for module in modules:
        if module.__dict__.get(FLAG) == _OURS:
            module.__dict__[FLAG] = True
