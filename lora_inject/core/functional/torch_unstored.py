"""Tensors without memory, of which nothing can be made that claims to have some.

`p.data = t` copies what torch keeps of t into p and asks no method of t. A tensor that torch takes
for a dense one of a device would leave p without memory, and the next read of p would end the
process. So torch takes these for meta tensors, which no other tensor's data can be set to, and
their class tells the device (`DEVICE`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from lora_inject.private import look_up

# The operation by which torch asks a class for the device of its tensor.
DEVICE = torch.ops.prim.device.default

_wrapper = look_up("torch.Tensor._make_wrapper_subclass")
can_make = _wrapper is not None


def unstored(
    cls: type,
    size: Sequence[int],
    stride: Sequence[int] | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Return a new tensor of a class whose `__torch_dispatch__` answers `DEVICE` with `device`."""
    return _wrapper(
        cls,
        size,
        stride,
        dtype=dtype,
        device="meta",
        dispatch_device=True,
        _extra_dispatch_keys=_autocast_key(device.type),
    )


@cache
def _autocast_key(kind: str) -> Any:
    """Return what makes autocast see tensors of a device, None where this torch does not tell."""
    keys, key_set = look_up("torch._C.DispatchKey"), look_up("torch._C.DispatchKeySet")
    key = getattr(keys, f"Autocast{kind.upper()}", None)
    return None if key is None or key_set is None else key_set(key)
