"""Tensors without memory, as lazy ones are, and the operations that leave them so.

`p.data = t` copies what torch keeps of t into p and asks no method of t. A tensor that torch takes
for a dense one of a device would leave p without memory, and the next read of p would end the
process. So torch takes these for meta tensors, which no other tensor's data can be set to, and
their class tells the device (`DEVICE`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

# The operation by which torch asks a class for the device of its tensor.
DEVICE = torch.ops.prim.device.default
_META = torch.device("meta")


def unstored(
    cls: type,
    size: Sequence[int],
    stride: Sequence[int] | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    offset: int = 0,
) -> Any:
    """Return a new tensor of a class whose `__torch_dispatch__` answers `DEVICE` with `device`."""
    return Tensor._make_wrapper_subclass(
        cls,
        size,
        stride,
        None if stride is None else offset,
        dtype=dtype,
        device=_META,
        dispatch_device=True,
        _extra_dispatch_keys=_autocast_key(device.type),
    )


@cache
def _autocast_key(kind: str) -> Any:
    """Return what makes autocast see tensors of a device, None for one without autocast."""
    key = getattr(torch._C.DispatchKey, f"Autocast{kind.upper()}", None)
    return None if key is None else torch._C.DispatchKeySet(key)


@cache
def is_view(func: object) -> bool:
    """Whether what an operation returns is, or may be, its first argument in another form."""
    schema = getattr(func, "_schema", None)  # an operation of higher order has none
    aliases = [a.alias_info for a in schema.arguments if a.alias_info] if schema else []
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def writes(func: object, args: Sequence[object], kwargs: Mapping[str, object], cls: type) -> bool:
    """Whether an operation would write into a tensor of a class, alone or in a list."""
    schema = getattr(func, "_schema", None)  # an operation of higher order has none
    for i, argument in enumerate([] if schema is None else schema.arguments):
        given = args[i] if i < len(args) else kwargs.get(argument.name)
        each = given if isinstance(given, tuple | list) else (given,)
        alias = argument.alias_info  # `is_write` of the argument itself is newer
        if alias is not None and alias.is_write and any(isinstance(t, cls) for t in each):
            return True
    return False


def called(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    cls: type,
    form: Callable[[Any], Tensor],
) -> Any:
    """Call an operation with each argument of a class in another form, alone or in a list.

    torch's own walk over nested arguments took a third of a small convolution's time.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, cls):
            return form(value)
        if type(value) in (list, tuple):
            return type(value)(map(plain, value))
        return value

    return func(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})
