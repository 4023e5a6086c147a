"""The mixin of every swapped class: what a kind of layer states, and how a call is computed.

A module that carries adapters stays the object it was and changes its class to one with such a
mixin to the left of its own (`swapped_class`), so everything that knew the old class still does:
`isinstance`, hooks, tied tensors, quantized weights, other references to the layer.

A module carries adapters in up to two ways. A *forward update* overrides `forward` and adds to the
output. A *weight update* is a property of the class with the name of a parameter: whoever reads
`module.weight` gets the effective value (`reading`), while the raw parameter stays where it was in
`_parameters`, under the same key. The weight of a layer with a forward update is such a property,
too, unless it is packed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lora_inject.core.layers.attached import Attached, Entry
from lora_inject.core.layers.checkpointing import check_live_checkpoint
from lora_inject.core.layers.library import check_not_offloaded
from lora_inject.core.layers.reading import read_mixed, run_reading
from lora_inject.core.layers.selection import Selected
from lora_inject.core.spec.sites import Geometry


class Adapted(nn.Module):
    """Mixin of every swapped class."""

    kind: ClassVar[str] = ""
    # The classes of this kind's layers.
    classes: ClassVar[tuple[type[nn.Module], ...]] = ()
    # Name of the layer's weight among its parameters.
    weight_name: ClassVar[str] = "weight"
    # Set on each swapped class by `adapted_class`.
    _lora_plain: ClassVar[type[nn.Module]]
    _lora_mixin: ClassVar[type[Adapted]]
    _lora_reads: ClassVar[frozenset[str]]
    _lora_stock: ClassVar[bool]
    # Set on each module by `swap`.
    _lora: Attached

    @classmethod
    def matches(cls, layer: type[nn.Module]) -> bool:
        """Return whether this kind is meant for layers of a class, with adapters or without."""
        return issubclass(layer, cls.classes)

    @staticmethod
    def geometry(module: nn.Module) -> Geometry:
        """Return the shapes of the layer's weight."""
        raise NotImplementedError

    @classmethod
    def weight_of(cls, layer: type[nn.Module]) -> str:
        """Return the name of the tensor, parameter or buffer, that stands for a class's weight."""
        return cls.weight_name

    @classmethod
    def adds_to_output(cls, module: nn.Module, *, stock: bool) -> bool:
        """Return whether `f(x; W + D) = f(x; W) + D x` is known of a module for any D.

        Else its weight reads as W + delta, which is right for whatever it computes. `stock` is what
        `cls.stock` says of the module's class.
        """
        return stock

    @staticmethod
    def stock(plain: type[nn.Module]) -> bool:
        """Return whether a class computes exactly what its kind's own torch class does."""
        return False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Let whoever takes part compute the layer; the arguments are those of its own forward."""
        attached: Any = self.__dict__.get("_lora")
        if attached is None:  # the adapter is gone; this method was kept, or the class is next
            plain: Any = plain_class(type(self))
            return plain.forward(self, *args, **kwargs)
        return attached.selection.current().forward(self, args, kwargs)

    def _lora_mixed(self, mix: Selected, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the layer with the adapters of a mix."""
        raise NotImplementedError

    def _lora_check_vain(self, tensors: Iterable[Tensor]) -> None:
        """Raise if adapters should train but no gradient would reach them."""
        if not self.training or torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled():
            check_not_offloaded(self)
        elif any(t.requires_grad for t in tensors):
            check_live_checkpoint()

    def _lora_raw(self, param: str) -> Any:
        """Return a parameter, or the tensor that FSDP1 or DataParallel has put in its place."""
        for held in (self._parameters, self.__dict__):
            if param in held:
                return held[param]
        return super().__getattr__(param)  # raises

    def _lora_read_mixed(
        self, param: str, raw: Any, taking: list[tuple[Entry, float]], *, outside: bool
    ) -> Any:
        """Return W + delta, of the entries of a mix that are on a parameter."""
        return read_mixed(self, param, raw, taking, outside=outside)


class WeightUpdate(Adapted):
    """A module whose parameters are read: the mixin for reads without a forward update."""

    kind = "reader"

    def _lora_mixed(self, mix: Selected, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the plain forward, whose reads give W + delta."""
        return run_reading(self, args, kwargs)


def plain_class(cls: type) -> type:
    """Return a class without our mixin: what the module is to everybody else."""
    if "_lora_plain" in cls.__dict__:
        plain: type = cls.__dict__["_lora_plain"]
        return plain
    if not issubclass(cls, Adapted):
        return cls
    return without_ours(cls, tuple(map(plain_class, cls.__bases__)))


_PLAIN: WeakValueDictionary[Any, type] = WeakValueDictionary()  # a class lives as long as a module


def without_ours(cls: type, plain_bases: tuple[type, ...]) -> type:
    """Return a class that is above a swapped one, on plain bases: one for each."""
    plain = _PLAIN.get(cls)
    if plain is None:
        plain = _PLAIN[cls] = _on(cls, plain_bases)
    return plain


def with_base(cls: type, old: type, new: type) -> type:
    """Return `cls` with `old` replaced by `new` among its bases, at any depth."""
    if cls is old:
        return new
    if not issubclass(cls, old):
        return cls
    return _on(cls, tuple(with_base(base, old, new) for base in cls.__bases__))


def _on(cls: type, bases: tuple[type, ...]) -> type:
    """Return a class like another, on other bases."""
    namespace = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, namespace)
