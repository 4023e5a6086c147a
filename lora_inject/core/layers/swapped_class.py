"""The swapped class: a module's own class with a mixin to the left of it, made once per class.

PyTorch's `fully_shard` and `parametrize` work the same way.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from lora_inject.core.layers.adapted import Adapted, WeightUpdate
from lora_inject.core.layers.carrier import Carrier
from lora_inject.core.layers.effective import cached_forward, selected_forward
from lora_inject.core.layers.reading import read_attribute
from lora_inject.core.layers.recurrent import members_of_recurrent
from lora_inject.core.layers.replaced import check_replaced
from lora_inject.core.layers.starting import reset
from lora_inject.errors import LayerError


class Swapped(Carrier):
    """Base of every swapped class: built, copied and pickled as the class below it."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Keep a swapped class from bases that register their subclasses, or want options."""
        if "_lora_plain" not in cls.__dict__:
            super().__init_subclass__(**options)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Build the plain class: `type(layer)(...)` must not make a carrier without adapters."""
        bare = "_lora_plain" not in cls.__dict__ or _wants_arguments(cls._lora_plain)
        if bare and not args and not kwargs:
            return object.__new__(cls)  # for a copy: of dynamo, or of a class on top (parametrize)
        return cls._lora_plain(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the plain class, from which the swapped one is made again."""
        return _rebuild, *reduction_of(self, super().__reduce_ex__(2))


def _wants_arguments(plain: type[nn.Module]) -> bool:
    try:
        inspect.signature(plain).bind()
    except (TypeError, ValueError):
        return True
    return False


def weight_property(param: str) -> property:
    """Return the property of a swapped class that replaces a parameter."""

    def read(self: Adapted) -> Any:
        return read_attribute(self, param, self._lora_raw(param))

    def write(self: Adapted, value: Any) -> None:
        # Parameters do not come here: nn.Module.__setattr__ puts them into `_parameters`.
        check_replaced(self, param)
        self.__dict__[param] = value

    def delete(self: Adapted) -> None:
        del self.__dict__[param]

    return property(read, write, delete)


READER = weight_property("").fget.__code__  # type: ignore[union-attr]
"""The code by whose caller it is known who reads a parameter (`torch_stack.module_calling`)."""


# Holds a class while a module has it, and lets it go with the last one.
_CLASSES: WeakValueDictionary[Any, type[Adapted]] = WeakValueDictionary()


def adapted_class(
    plain: type[nn.Module], mixin: type[Adapted], reads: Iterable[str]
) -> type[Adapted]:
    """Return the swapped class of a plain class: one per class, or torch.compile guards fail.

    `reads` are the parameters whose effective value is read, besides the weight of a stock layer.
    """
    asked = (plain, mixin, frozenset(reads), plain.forward)  # another forward may be no stock one
    if (known := _CLASSES.get(asked)) is not None:
        return known
    stock = mixin.stock(plain)
    reads = asked[2] | {mixin.weight_name} if stock else asked[2]
    key = (plain, mixin, reads, plain.forward)
    swapped = _CLASSES.get(key)
    if swapped is None:
        namespace: dict[str, Any] = {name: weight_property(name) for name in sorted(reads)}
        namespace |= {
            "_lora_plain": plain,
            "_lora_mixin": mixin,
            "_lora_reads": reads,
            "_lora_stock": stock,
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
        }
        if issubclass(plain, nn.RNNBase):
            namespace |= members_of_recurrent()
        if callable(getattr(plain, "reset_parameters", None)):
            namespace["reset_parameters"] = _resetting(plain)
        if mixin is WeightUpdate:
            namespace["forward"] = selected_forward(plain, mixin.forward)
            namespace["_lora_cached"] = cached_forward(plain)
        swapped = types.new_class(
            plain.__name__, (mixin, Swapped, plain), exec_body=lambda ns: ns.update(namespace)
        )
        if _layout(plain) is not _layout(mixin):
            swapped = in_layout_of(plain, swapped, namespace)
        _CLASSES[key] = swapped
    _CLASSES[asked] = swapped
    return swapped


def _resetting(plain: Any) -> Callable[..., Any]:
    """Return the `reset_parameters` of a swapped class, which finds the parameters themselves."""

    @functools.wraps(plain.reset_parameters)
    def reset_parameters(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return reset(self, plain.reset_parameters, args, kwargs)

    return reset_parameters


def _layout(cls: type) -> type:
    """Return the class that the memory layout of a class begins with; usually nn.Module."""
    while (base := cls.__base__) is not object and base is not None:
        cls = base
    return cls


def _rebuild(plain: type[nn.Module], mixin: type[Adapted], reads: tuple[str, ...]) -> Adapted:
    """Make an empty carrier, for pickle and deepcopy, which then restore its state."""
    made: Adapted = object.__new__(adapted_class(plain, mixin, reads))
    return made


def in_layout_of(plain: type, wanted: type, namespace: dict[str, Any]) -> Any:
    """Return a class like `wanted` that instances of `plain` can change to.

    Python lets an object change its class only where both derive first from the same layout. Where
    a mixin stands before nn.Module ours has to come second among the
    bases, and first in the order in which methods are looked up.
    """
    meta: Any = type("Reordered", (type(plain),), {"mro": lambda cls: [cls, *wanted.__mro__[1:]]})
    bases = wanted.__bases__[::-1]
    return types.new_class(
        plain.__name__, bases, {"metaclass": meta}, lambda ns: ns.update(namespace)
    )


def reduction_of(layer: Adapted, reduced: Any) -> tuple[tuple[Any, ...], Any]:
    """Return what a swapped class is made from again, and the state of the layer.

    `reduced` is what `__reduce_ex__` of the plain class returns.

    Raises:
        LayerError: The layer's own state leaves out its adapters.
    """
    state = reduced[2] if isinstance(reduced, tuple) and len(reduced) > 2 else layer.__dict__
    attributes = state[0] if isinstance(state, tuple) and state else state
    if not isinstance(attributes, dict) or "_lora" not in attributes:
        asked = f"a copy or pickle of a {type(layer).__name__}"
        problem = "its own __getstate__ leaves out what carries the adapters"
        raise LayerError(asked, problem, "Let it return all of __dict__, or eject first")
    return (layer._lora_plain, layer._lora_mixin, tuple(sorted(layer._lora_reads))), state
