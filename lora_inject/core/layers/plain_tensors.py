"""Tensors whose elements are the values of a weight, and those whose elements are not."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from lora_inject.private import look_up

_FAKES = (
    look_up("torch._subclasses.fake_tensor.FakeTensor"),
    look_up("torch._subclasses.functional_tensor.FunctionalTensor"),
)
# Tensors that W + delta can be formed from: neither packed nor sharded, or their fakes in a trace.
PLAIN: tuple[type, ...] = (nn.Parameter, Tensor, *filter(None, _FAKES))


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is packed, so that its elements are not its values."""
    dtype = weight.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return True
    # A DTensor has elements here.
    return type(weight) not in PLAIN and not hasattr(weight, "full_tensor")


def sharded_by(tensor: Tensor) -> str | None:
    """Return what holds only a part of a tensor in this process, None for a whole tensor."""
    if type(tensor) is not nn.Parameter and hasattr(tensor, "full_tensor"):
        return "fully_shard or parallelize_module (it is a DTensor)"
    if hasattr(tensor, "ds_id"):
        return "DeepSpeed ZeRO-3"
    return None


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; a collective operation where each process holds a part of it."""
    values = tensor.detach()
    gather = getattr(values, "full_tensor", None)
    if gather is None:
        return values
    gathered: Tensor = gather()
    return gathered


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")
