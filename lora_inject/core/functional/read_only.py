"""What was read of an adapted weight must not be written to: the write would reach a temporary.

`ReadOnly` is a formed value in memory of its own. Operations on it give plain tensors, but for
those that share its memory, which stay read-only. In-place operations, `out=` and new Parameters of
it are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lora_inject.core.functional.torch_stack import in_forward
from lora_inject.errors import LayerError

# What a Parameter has as `__torch_function__` runs a function, past that of any subclass.
run_plainly: Any = nn.Parameter.__torch_function__


def refuse_change(func: Any) -> NoReturn:
    """Raise for an operation that would change what was read."""
    raise LayerError(
        f"{getattr(func, '__name__', func)} on what was read of a weight with an adapter",
        "it is W + delta, which is nowhere stored, and W would stay as it is",
        'Change a .clone() of it, or W itself: layer.get_parameter("weight"). Where the layer has '
        "an adapter and is to be replaced, call merge(model, eject=True) first",
    )


def check_hook_is_met(func: Any) -> None:
    """Raise for a hook on what nobody computes with: outside of a forward, which reads anew."""
    if func == Tensor.register_hook and not in_forward():
        raise LayerError(
            "register_hook on what was read of a weight with an adapter",
            "it is W + delta as it is now, and a forward reads it anew: the hook would see no "
            "gradient",
            "Register it on what trains, a Parameter of adapter_parameters(model) or "
            "layer.get_parameter(...), or on a .clone() that you compute with",
        )


def check_not_written(cls: type, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise for a function of torch that would write into a tensor of a class.

    Torch ends the names of what writes into its first argument with an underscore.
    """
    name = getattr(func, "__name__", "").partition(".")[0]
    if name.endswith("_") and (not name.endswith("__") or _assigns(name)):
        given = args or (*kwargs.values(),)  # torch.nn.init passes all by name
        # `x.data = W` would make the memory of W writable.
        _check_none_among(cls, func, given if name == "__set__" else given[:1])
    if kwargs:
        _check_none_among(cls, func, kwargs.get("out"))
        if kwargs.get("inplace") is True:
            _check_none_among(cls, func, args[:1])


def _assigns(name: str) -> bool:
    """Whether a special method is that of x += y, x[i] = y, or x.data = y."""
    augmented = name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}")
    return augmented or name in ("__set__", "__setitem__")


def _check_none_among(cls: type, func: Any, written: Any) -> None:
    each = written if isinstance(written, tuple | list) else (written,)
    if any(isinstance(t, cls) for t in each):
        refuse_change(func)
    for inner in each:
        if isinstance(inner, tuple | list):
            _check_none_among(cls, func, inner)


class _TypeOfRead(str):
    """What `type()` says of such a value.

    torch puts it into the error by which it refuses to make the value another layer's Parameter.
    """

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        words = "W + delta of a weight with an adapter: before its layer is replaced, eject, or "
        return f"{format(str(self), spec)} ({words}call merge(model, eject=True))"


def type_of_read(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand for `Tensor.type` in the classes of what was read."""
    result = Tensor.type(self, *args, **kwargs)
    return _TypeOfRead(result) if isinstance(result, str) else result


class ReadOnly(Tensor):
    """The formed value of a weight with an adapter, or what shares its memory."""

    is_read_only = True
    type = type_of_read

    def _use_count(self) -> NoReturn:
        """Refuse `torch.utils.swap_tensors`, which asks it of both tensors before it swaps."""
        refuse_change(torch.utils.swap_tensors)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Compute like a plain tensor, but write nothing."""
        kwargs = kwargs or {}
        check_not_written(cls, func, args, kwargs)
        check_hook_is_met(func)
        if func == Tensor.__deepcopy__:  # as of a Parameter: a value without a graph
            return unmarked(args[0]).detach().clone()
        result = run_plainly(func, types, args, kwargs)
        for given in (*args, *kwargs.values()):
            if type(given) is cls:
                return still_read_only(result, given)
        return result


def read_only(value: Tensor) -> Tensor:
    """Return a formed value as one that cannot be written to."""
    plain = type(value) is Tensor and value.layout is torch.strided
    return value.as_subclass(ReadOnly) if plain else value


def still_read_only(result: Any, source: Tensor) -> Any:
    """Return the result of an operation, read-only where it is what the source is.

    That is what has its memory, or is a copy on another device, which is made to be put there.
    """
    if type(result) in (tuple, list):
        return type(result)(still_read_only(each, source) for each in result)
    if type(result) is not Tensor or result.layout is not torch.strided or result.is_meta:
        return result
    return read_only(result) if _is_part(result, source) else result


def _is_part(result: Tensor, source: Tensor) -> bool:
    source = unmarked(source)
    if result.device != source.device:
        return result.shape == source.shape
    return result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()


def unmarked(value: Any) -> Any:
    """Return what was formed as a plain tensor, for a kernel that only reads it."""
    if type(value) is not ReadOnly:
        return value
    return run_plainly(Tensor.as_subclass, (), (value, Tensor), {})
