"""Tensors without memory, as lazy ones are, and the operations that leave them so.

`p.data = t` copies what torch keeps of t into p and asks no method of t. A tensor that torch takes
for a dense one of a device would leave p without memory, and the next read of p would end the
process. So torch takes these for meta tensors, which no other tensor's data can be set to, and
their class tells the device (`DEVICE`).

What picks matrices of a stack or transposes them (`PICKED`) calls `part`, `turned` and `is_stack`
of such a tensor. What is not a pick returns NotImplemented.
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
) -> Any:
    """Return a new tensor of a class whose `__torch_dispatch__` answers `DEVICE` with `device`."""
    return Tensor._make_wrapper_subclass(
        cls,
        size,
        stride,
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


def _permuted(stack: Any, dims: Sequence[int] = (1, 0)) -> Any:
    last, n = [stack.dim() - 1, stack.dim() - 2], stack.dim()
    return stack.turned() if [d % n for d in dims] == [*range(n - 2), *last] else NotImplemented


def _transposed(stack: Any, dim0: int, dim1: int) -> Any:
    n = stack.dim()
    return stack.turned() if {dim0 % n, dim1 % n} == {n - 2, n - 1} else NotImplemented


def _selected(stack: Any, dim: int, index: int) -> Any:
    picks = stack.is_stack and dim in (0, -3)
    return stack.part(index % len(stack)) if picks else NotImplemented


def _unbound(stack: Any, dim: int = 0) -> Any:
    picks = stack.is_stack and dim in (0, -3)
    return [stack.part(i) for i in range(len(stack))] if picks else NotImplemented


def _gathered(stack: Any, indices: Sequence[Tensor | None]) -> Any:
    (index, *others) = indices
    if others or not stack.is_stack or index is None or index.dim() != 1:
        return NotImplemented
    return NotImplemented if index.dtype in (torch.bool, torch.uint8) else stack.part(index)


PICKED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.t.default: _permuted,
    torch.ops.aten.permute.default: _permuted,
    torch.ops.aten.transpose.int: _transposed,
    torch.ops.aten.select.int: _selected,
    torch.ops.aten.unbind.int: _unbound,
    torch.ops.aten.index.Tensor: _gathered,
}


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
