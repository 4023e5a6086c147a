"""Tensors of an adapter in another dtype, each finite where it was."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_inject.errors import StateError, check_type


def caster(dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    """Return what casts a floating point tensor; its name is for the error of an overflow.

    Raises:
        StateError: `dtype` is not a floating point dtype.
    """
    check_type("to, dtype", dtype, torch.dtype, "Give torch.bfloat16")
    if not dtype.is_floating_point:
        problem = "it is not a floating point dtype"
        raise StateError(f"to({dtype})", problem, "Give torch.bfloat16")

    def cast(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        made = tensor.to(dtype)
        if not made.is_meta and int(made.isinf().sum()) > int(tensor.isinf().sum()):
            problem = "it holds values that would become infinite"
            raise StateError(f"to({dtype}), '{name}'", problem, "Give torch.bfloat16")
        return made

    return cast
