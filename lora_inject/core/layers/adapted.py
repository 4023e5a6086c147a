"""The class of a module that carries adapters: its own, with a mixin to the left of it.

A module that carries adapters stays the object it was and changes its class, so everything that
knew the old class still does: `isinstance`, hooks, tied tensors, quantized weights, other
references to the layer. There is one such class for each plain one.

A module carries adapters in up to two ways. A *forward update* overrides `forward` and adds to the
output. A *weight update* is a property of the class with the name of a parameter: whoever reads
`module.weight` gets the effective value (`reading`), while the raw parameter stays where it was in
`_parameters`, under the same key. The weight of a layer with a forward update is such a property,
too, unless it is packed. `Adapted` does what else the class has to do like the one below it: move,
cast, save, load, register, copy and pickle.
"""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping
from typing import Any, ClassVar, SupportsIndex
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lora_inject.core.functional.lazy import LazyWeight
from lora_inject.core.functional.patches import patch
from lora_inject.core.functional.torch_inside import runs_plainly
from lora_inject.core.layers.attached import Carrier, held_by
from lora_inject.core.layers.checkpointing import check_live_checkpoint
from lora_inject.core.layers.library import check_not_offloaded
from lora_inject.core.layers.reading import (
    OWN,
    check_replaced,
    keeping,
    read_attribute,
    read_mixed,
    run_reading,
)
from lora_inject.core.layers.recurrent import members_of_recurrent
from lora_inject.core.layers.selection import Selected
from lora_inject.core.layers.starting import EMPTYING, on_meta
from lora_inject.core.layers.state_dict import check_put, taking, tell
from lora_inject.core.spec.sites import Geometry
from lora_inject.errors import LayerError


class Adapted(Carrier):
    """Mixin of every swapped class."""

    kind: ClassVar[str] = ""
    # The classes of this kind's layers.
    classes: ClassVar[tuple[type[nn.Module], ...]] = ()
    # Set on each swapped class by `adapted_class`.
    _lora_mixin: ClassVar[type[Adapted]]
    _lora_reads: ClassVar[frozenset[str]]
    _lora_stock: ClassVar[bool]

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

    # As `Mix.read` calls it, which stands below `reading`.
    _lora_read_mixed = read_mixed

    def __init_subclass__(cls, **options: Any) -> None:
        """Keep a swapped class from bases that register their subclasses, or want options."""
        if "_lora_plain" not in cls.__dict__:
            super().__init_subclass__(**options)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Become a plain layer: `type(layer)(...)` must not make a carrier without adapters."""
        object.__setattr__(self, "__class__", self._lora_plain)
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle and copy by the plain class, from which the swapped one is made again.

        Raises:
            LayerError: The layer's own state leaves out its adapters.
        """
        reduced = super().__reduce_ex__(2)
        state = reduced[2] if isinstance(reduced, tuple) and len(reduced) > 2 else self.__dict__
        attributes = state[0] if isinstance(state, tuple) and state else state
        if not isinstance(attributes, dict) or "_lora" not in attributes:
            raise LayerError(
                f"a copy or pickle of a {type(self).__name__}",
                "its own __getstate__ leaves out what carries the adapters",
                "Let it return all of __dict__, or eject first",
            )
        made_of = (self._lora_plain, self._lora_mixin, tuple(sorted(self._lora_reads)))
        return _rebuild, made_of, state

    # ------------------------------------------------------------------------------ its tensors

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move or cast like nn.Module, but never narrow an adapter's float32 masters."""
        held = (self._parameters[name] for name in self._lora.flat)
        masters = {id(t) for p in held if p is not None for t in (p, p.grad)}

        def keep_wide(t: Tensor) -> Tensor:
            out: Tensor = fn(t)
            if out.dtype == t.dtype or id(t) not in masters or out.dtype.itemsize >= 4:
                return out
            return t.to(out.device, torch.float32)

        attached, emptied = self._lora, getattr(fn, "__code__", None) in EMPTYING
        without = [entry for entry in attached.entries() if emptied or on_meta(self, entry)]
        super()._apply(keep_wide, recurse)  # type: ignore[no-untyped-call]
        for name in attached.flat:
            attached.selection.extend_to(held_by(self)[name].device)
        if garbage := {entry.mark for entry in without if not on_meta(self, entry)}:
            attached.garbage |= garbage
            attached.forget_use()
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register like nn.Module, but nothing in the place of an adapted weight, or of A.

        What is put there may be the weight with something done to it: quantized, pruned, or fused
        with a norm, of which the update knows nothing. Shards may be put there, and what
        `load_state_dict` assigns.
        """
        there, attached = self._parameters.get(name), self._lora
        assigned = OWN.replaces and OWN.keeps is attached
        is_same = param is there or hasattr(param, "full_tensor") or assigned
        # What prune registers, under another name; merged, a read gives the parameter itself.
        if isinstance(param, LazyWeight) or any(
            param is self._parameters.get(each.param) and each.param != name
            for each in attached.entries()
        ):
            check_replaced(self, name)
        if there is not None and not is_same and self._lora_carries(name):
            check_replaced(self, name)
        super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        """Delete like nn.Module, but not what carries an adapter, as parametrize does."""
        if name in self._parameters and self._lora_carries(name):
            check_replaced(self, name)
        super().__delattr__(name)

    def _lora_carries(self, name: str) -> bool:
        """Return whether a Parameter has an adapter, or is one's."""
        attached = self._lora
        return name in attached.flat or any(each.param == name for each in attached.entries())

    # --------------------------------------------------------------------------- its state dict

    def _save_to_state_dict(
        self, destination: MutableMapping[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Save like nn.Module, and note what the tensors do not tell."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        tell(self._lora, destination, prefix)

    @property
    def _lora_forms(self) -> Tensor:
        """The attribute that torch looks for under each key of a state dict."""
        return torch.empty(0)

    @_lora_forms.setter
    def _lora_forms(self, value: Tensor) -> None:
        """Compare what `torch.func.functional_call` puts there, where its values can be read."""
        if value.numel() and runs_plainly():
            check_put(self._lora, value)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Let a plain base checkpoint load strictly; half an adapter is still missing keys."""
        lists = missing_keys, unexpected_keys
        with taking(self, self._lora, state_dict, prefix, local_metadata, *lists):
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, *lists, error_msgs
            )

    # ------------------------------------------------------------------------------ what it says

    def extra_repr(self) -> str:
        """Return the plain layer's description and the adapters on it."""
        notes = Counter(f"{e.adapter}: r={e.spec.rank}" for e in self._lora.entries() if e.spec)
        parts = [f"{note} x{n}" if n > 1 else note for note, n in notes.items()]
        adapters = f"lora={{{', '.join(parts)}}}" if parts else ""
        return ", ".join(filter(None, [super().extra_repr(), adapters]))


class WeightUpdate(Adapted):
    """A module whose parameters are read: the mixin for reads without a forward update."""

    kind = "reader"

    def _lora_mixed(self, mix: Selected, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the plain forward, whose reads give W + delta."""
        return run_reading(self, args, kwargs)


def _rebuild(plain: type[nn.Module], mixin: type[Adapted], reads: tuple[str, ...]) -> Adapted:
    """Make an empty carrier, for pickle and deepcopy, which then restore its state."""
    made: Adapted = object.__new__(adapted_class(plain, mixin, reads))
    return made


def _itself(get: Callable[..., nn.Parameter]) -> Callable[..., nn.Parameter]:
    """Return a `get_parameter` that gives a Parameter itself, as `named_parameters` does."""

    @functools.wraps(get)
    def get_parameter(self: nn.Module, target: str) -> nn.Parameter:
        path, _, name = target.rpartition(".")
        owner = self.get_submodule(path)
        held = owner._parameters.get(name) if isinstance(owner, Adapted) else None
        return get(self, target) if held is None else held

    return get_parameter


patch(nn.Module, "get_parameter", _itself)


def _refusing(take: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of torch that takes a parameter out of a layer's table by itself.

    So of all that makes a weight computed, or plain again, only it asks nothing of the layer.
    """

    @functools.wraps(take)
    def refusing(*args: Any) -> Any:
        layer, by = args[:2] if isinstance(args[0], nn.Module) else args[1::-1]
        if isinstance(layer, Adapted):
            name = by if isinstance(by, str) else getattr(by, "name", None) or by._tensor_name
            parts = {name, f"{name}_orig", f"{name}_v", f"{name}_g"}
            for entry in layer._lora.entries():
                if entry.param in parts:
                    check_replaced(layer, entry.param)
        return take(*args)

    return refusing


patch(WeightNorm, "apply", _refusing)
for _owner in (WeightNorm, SpectralNorm, BasePruningMethod):
    patch(_owner, "remove", _refusing)

# ------------------------------------------------------------------------------- making the class


def weight_property(param: str) -> property:
    """Return the property of a swapped class that replaces a parameter."""

    def read(self: Adapted) -> Any:
        return read_attribute(self, param)

    def write(self: Adapted, value: Any) -> None:
        # Parameters do not come here: nn.Module.__setattr__ puts them into `_parameters`.
        check_replaced(self, param)
        self.__dict__[param] = value

    def delete(self: Adapted) -> None:
        del self.__dict__[param]

    return property(read, write, delete)


READER = weight_property("").fget.__code__  # type: ignore[union-attr]
"""The code by whose caller it is known who reads a parameter (`torch_inside.module_calling`)."""


# Holds a class while a module has it, and lets it go with the last one.
_CLASSES: WeakValueDictionary[Hashable, type[Adapted]] = WeakValueDictionary()


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
    all_reads = asked[2] | {mixin.weight_name} if stock else asked[2]
    key = (plain, mixin, all_reads, plain.forward)
    swapped = _CLASSES.get(key) or _made(plain, mixin, all_reads, stock)
    _CLASSES[key] = _CLASSES[asked] = swapped
    return swapped


def _made(
    plain: type[nn.Module], mixin: type[Adapted], reads: frozenset[str], stock: bool
) -> type[Adapted]:
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
        namespace["forward"] = _with_signature(plain.forward)
    bases = (mixin, plain)
    return types.new_class(plain.__name__, bases, exec_body=lambda ns: ns.update(namespace))


def _with_signature(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a class that is read, with the signature of its own."""

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return Adapted.forward(self, *args, **kwargs)

    return forward


OF_READERS = _with_signature(nn.Module.forward).__code__  # type: ignore[attr-defined]


def has_fixed_class(plain: type[nn.Module]) -> bool:
    """Whether Python lets no module of a class change it, as something lies before nn.Module.

    Examples:
        >>> from abc import ABC
        >>> class Mixed(ABC):
        ...     pass
        >>> class First(Mixed, nn.Linear):
        ...     pass
        >>> class Last(nn.Linear, Mixed):
        ...     pass
        >>> has_fixed_class(First), has_fixed_class(Last)
        (True, False)
    """
    begins: type = plain
    while (base := begins.__base__) is not object and base is not None:
        begins = base
    if begins is nn.Module:  # nearly all, and a class costs time
        return False
    try:
        nn.Module.__new__(plain).__class__ = _made(plain, WeightUpdate, frozenset(), stock=False)
    except TypeError:
        return True
    return False


def _resetting(plain: Any) -> Callable[..., Any]:
    """Return the `reset_parameters` of a swapped class, which finds the parameters themselves."""

    @functools.wraps(plain.reset_parameters)
    def reset_parameters(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with keeping(self.__dict__["_lora"]):
            return plain.reset_parameters(self, *args, **kwargs)

    return reset_parameters


# ------------------------------------------------------------------------------ the class without


def plain_class(cls: type) -> type:
    """Return a class without our mixin: what the module is to everybody else."""
    if "_lora_plain" in cls.__dict__:
        plain: type = cls.__dict__["_lora_plain"]
        return plain
    if not issubclass(cls, Adapted):
        return cls
    on_plain_bases = _PLAIN.get(cls)  # of a class that is above a swapped one
    if on_plain_bases is None:
        on_plain_bases = _PLAIN[cls] = _on(cls, tuple(map(plain_class, cls.__bases__)))
    return on_plain_bases


_PLAIN: WeakValueDictionary[Any, type] = WeakValueDictionary()  # a class lives as long as a module


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
