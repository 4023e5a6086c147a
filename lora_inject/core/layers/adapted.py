"""The swapped class: a module's own class with a mixin to the left of it, made once per class.

A module that carries adapters stays the object it was and changes its class, so
everything that knew the old class still does: `isinstance`, hooks, tied tensors, quantized weights,
other references to the layer. (PyTorch's FSDP2 and parametrize work the same way.)

A module carries adapters in up to two ways. A *forward update* overrides `forward` and adds to the
output. A *weight update* is a property of the class with the name of a parameter: whoever reads
`module.weight` gets the effective value, while the raw parameter stays where it was in
`_parameters`, under the same key. The weight of a layer with a forward update is such a property,
too, unless it is packed.
"""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lora_inject.core.functional.read_only import ReadOnly
from lora_inject.core.layers.attached import held_by
from lora_inject.core.layers.loading import watch_loading
from lora_inject.core.layers.own_code import OWN, keeping
from lora_inject.core.layers.reading import Reading, cached_forward, weight_property
from lora_inject.core.layers.selected import Mix
from lora_inject.core.layers.valueless import EMPTYING, moved
from lora_inject.core.spec.sites import Geometry
from lora_inject.errors import LayerError


class Adapted(Reading):
    """Mixin of every swapped class: copies, pickles, casts and loads like the class below it."""

    kind: ClassVar[str] = ""
    # The classes of this kind's layers.
    classes: ClassVar[tuple[type[nn.Module], ...]] = ()
    # Set on each swapped class by `adapted_class`.
    _lora_mixin: ClassVar[type[Adapted]]
    _lora_reads: ClassVar[frozenset[str]]

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return whether this kind of layer is meant for `module`."""
        return isinstance(module, cls.classes)

    @staticmethod
    def geometry(module: nn.Module) -> Geometry:
        """Return the shapes of the layer's weight."""
        raise NotImplementedError

    @classmethod
    def weight_of(cls, module: nn.Module) -> str:  # noqa: ARG003 - for kinds that pack it
        """Return the name of the tensor, parameter or buffer, that stands for the weight."""
        return cls.weight_name

    @classmethod
    def adds_to_output(cls, module: nn.Module) -> bool:
        """Return whether `f(x; W + D) = f(x; W) + D x` is known of a module for any D.

        Else its weight reads as W + delta, which is right for whatever it computes.
        """
        return cls.stock(plain_class(type(module)))

    @staticmethod
    def stock(plain: type[nn.Module]) -> bool:  # noqa: ARG004 - for kinds that have one
        """Return whether a class computes exactly what its kind's own torch class does."""
        return False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Let whoever takes part compute the layer; the arguments are those of its own forward."""
        attached: Any = self.__dict__.get("_lora")
        if attached is None:  # somebody kept this method, and the adapter is gone
            return type(self).forward(self, *args, **kwargs)
        return attached.selection.current().forward(self, args, kwargs)

    def _lora_mixed(self, mix: Mix, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the layer with the adapters of a mix."""
        raise NotImplementedError

    def __init_subclass__(cls, **options: Any) -> None:
        """Keep a swapped class from bases that register their subclasses, or want options."""
        if "_lora_plain" not in cls.__dict__:
            super().__init_subclass__(**options)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Build the plain class: `type(layer)(...)` must not make a carrier without adapters."""
        if "_lora_plain" not in cls.__dict__ and not args and not kwargs:
            return object.__new__(cls)  # a copy of a class on top of ours (torch's parametrize)
        return cls._lora_plain(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the plain class, from which the swapped one is made again."""
        mixin = self._lora_mixin
        found = super().__reduce_ex__(2)
        state = found[2] if isinstance(found, tuple) and len(found) > 2 else self.__dict__
        attributes = state[0] if isinstance(state, tuple) and state else state
        if not isinstance(attributes, dict) or "_lora" not in attributes:
            raise LayerError(
                f"a copy or pickle of a {type(self).__name__}",
                "its own __getstate__ leaves out what carries the adapters",
                "Let it return all of __dict__, or eject first",
            )
        return _rebuild, (self._lora_plain, mixin, tuple(sorted(self._lora_reads))), state

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move or cast like nn.Module, but never narrow an adapter's float32 masters."""
        held = (self._parameters[name] for name in self._lora.flat)
        masters = {id(t) for p in held if p is not None for t in (p, p.grad)}

        def keep_wide(t: Tensor) -> Tensor:
            out: Tensor = fn(t)
            if out.dtype == t.dtype or id(t) not in masters or out.dtype.itemsize >= 4:
                return out
            return t.to(out.device, torch.float32)

        super()._apply(keep_wide, recurse)  # type: ignore[no-untyped-call]
        for name in self._lora.flat:
            self._lora.selection.extend_to(held_by(self)[name].device)
        moved(self, emptied=getattr(fn, "__code__", None) in EMPTYING)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save like nn.Module, and note what the tensors do not tell."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        noted = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if noted is not None:
            from lora_inject.core.layers.forms import note_forms  # no part of a forward

            note_forms(self._lora, noted)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Let a plain base checkpoint load strictly; half an adapter is still missing keys."""
        from lora_inject.core.layers.forms import form_key, refuse_unfit

        refuse_unfit(self, prefix, state_dict, local_metadata)
        waits = bool(self._lora.valueless or self._lora.by_reset)
        if waits:
            from lora_inject.core.layers.starting import names_given, start_loaded

            given = names_given(self, state_dict, prefix)
        with keeping(self._lora, replaces=True):
            lists = missing_keys, unexpected_keys, error_msgs
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        if waits:
            start_loaded(self, given)
        forms = {prefix + form_key(entry) for entry in self._lora.entries()}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in forms]
        by_adapter: dict[str, list[str]] = {}
        for entry in self._lora.entries():
            by_adapter.setdefault(entry.adapter, []).extend(
                prefix + n for n in entry.names.values()
            )
        loading = self._lora.selection.loading(missing_keys)
        for adapter, keys in by_adapter.items():
            loading.note(adapter, keys, found=any(key in state_dict for key in keys))

    def extra_repr(self) -> str:
        """Return the plain layer's description and the adapters on it."""
        notes = Counter(f"{e.adapter}: r={e.spec.rank}" for e in self._lora.entries() if e.spec)
        parts = [f"{note} x{n}" if n > 1 else note for note, n in notes.items()]
        adapters = f"lora={{{', '.join(parts)}}}" if parts else ""
        return ", ".join(filter(None, [super().extra_repr(), adapters]))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register like nn.Module, but nothing in the place of an adapted weight, or of A.

        What is put there may be the weight with something done to it: quantized, pruned, or fused
        with a norm, of which the update knows nothing. Nor does a weight get a second name, the
        first step of torch's `prune`, which later cannot be undone.
        """
        attached = self._lora
        loads = OWN.keeps is attached and OWN.replaces
        weight = (self.weight_name,) if attached.forward else ()
        for adapted in (*attached.reads, *weight, *attached.flat):
            if adapted not in self._parameters and attached.put_back(adapted, self._parameters):
                self._lora_refuse_replaced(adapted)
            held = self._parameters.get(adapted)
            if held is None or (loads and param is not None):
                continue
            another = param is not held and not hasattr(param, "full_tensor")
            if another if name == adapted else param is held or isinstance(param, ReadOnly):
                self._lora_refuse_replaced(adapted)
        super().register_parameter(name, param)

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return a Parameter itself, as `parameters()` yields it."""
        return raw_parameter(self, target)

    def __delattr__(self, name: str) -> None:
        """Delete like nn.Module, but not what carries an adapter."""
        adapted = name in self._lora.flat or any(e.param == name for e in self._lora.entries())
        if name in self._parameters and adapted:
            self._lora_refuse_replaced(name)
        super().__delattr__(name)

    def _replicate_for_data_parallel(self) -> Any:
        """Make the replica that torch's DataParallel fills, of the swapped class."""
        replica: Any = object.__new__(type(self))
        replica.__dict__ = {**self.__dict__, "_parameters": {}, "_is_replica": True}
        replica._buffers, replica._modules = self._buffers.copy(), self._modules.copy()
        if (flat := self.__dict__.get("_flat_weights")) is not None:  # replicas write theirs
            replica.__dict__["_flat_weights"] = flat[:]
        return replica

    def __prepare_scriptable__(self) -> Any:
        """Raise, before torch.jit.script has changed anything."""
        raise LayerError(
            f"torch.jit.script of a {type(self).__name__}",
            "it carries an adapter, which a script cannot",
            "Call merge(model, eject=True) first, or use torch.jit.trace or torch.export",
        )


def raw_parameter(module: nn.Module, target: str) -> nn.Parameter:
    """Return what `nn.Module.get_parameter` returns where no adapter is: the Parameter itself."""
    path, _, name = target.rpartition(".")
    owner = module.get_submodule(path)
    held = owner._parameters.get(name) if isinstance(owner, Adapted) else None
    return nn.Module.get_parameter(module, target) if held is None else held


class WeightUpdate(Adapted):
    """A module whose parameters are read: the mixin for reads without a forward update."""

    kind = "reader"
    _lora_cached: ClassVar[Callable[..., Any]]

    def _lora_mixed(self, mix: Mix, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG002
        """Run the plain forward, whose reads give W + delta."""
        return self._lora_cached(*args, **kwargs)


def selected_forward(plain: type[nn.Module]) -> Callable[..., Any]:
    """Return a forward with the signature of the plain one, by whoever is selected."""

    @functools.wraps(plain.forward)
    def forward(self: Adapted, *args: Any, **kwargs: Any) -> Any:
        return Adapted.forward(self, *args, **kwargs)

    return forward


# Both hold a class while a module has it, and let it go with the last one.
_CLASSES: WeakValueDictionary[Any, type[Adapted]] = WeakValueDictionary()
_PLAIN: WeakValueDictionary[Any, type] = WeakValueDictionary()


def adapted_class(
    plain: type[nn.Module], mixin: type[Adapted], reads: Iterable[str]
) -> type[Adapted]:
    """Return the swapped class of a plain class: one per class, or torch.compile guards fail.

    `reads` are the parameters whose effective value is read, besides the weight of a stock layer.
    """
    watch_loading()
    stock = mixin.stock(plain)
    key = (plain, mixin, frozenset({*reads, mixin.weight_name} if stock else reads))
    found = _CLASSES.get(key)
    if found is None:
        namespace: dict[str, Any] = {name: weight_property(name) for name in sorted(key[2])}
        namespace |= {
            "_lora_plain": plain,
            "_lora_mixin": mixin,
            "_lora_reads": key[2],
            "_lora_stock": stock,
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
            **_members_of(plain),
        }
        if callable(getattr(plain, "reset_parameters", None)):
            namespace["reset_parameters"] = _resetting(plain)
        if mixin is WeightUpdate:
            namespace["forward"] = selected_forward(plain)
            namespace["_lora_cached"] = cached_forward(plain)
        found = types.new_class(
            plain.__name__, (mixin, plain), exec_body=lambda ns: ns.update(namespace)
        )
        if _layout(plain) is not _layout(mixin):
            found = _in_layout_of(plain, found, namespace)
        _CLASSES[key] = found
    return found


def _members_of(plain: type[nn.Module]) -> dict[str, Any]:
    """Return further members for the swapped class of an LSTM, GRU or RNN."""
    if not issubclass(plain, nn.RNNBase):
        return {}
    # Here, as it imports torch's compiler, which doubles the start of a program.
    from lora_inject.core.layers.recurrent import RECURRENT

    return RECURRENT


def _resetting(plain: Any) -> Callable[..., Any]:
    """Return the `reset_parameters` of a swapped class, which finds the parameters themselves."""

    @functools.wraps(plain.reset_parameters)
    def reset_parameters(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with keeping(self.__dict__["_lora"]):
            result = plain.reset_parameters(self, *args, **kwargs)
        if self.__dict__["_lora"].valueless:
            from lora_inject.core.layers.starting import start_reset

            start_reset(self)
        return result

    return reset_parameters


def _layout(cls: type) -> type:
    """Return the class that the memory layout of a class begins with; usually nn.Module."""
    while (base := cls.__base__) is not object and base is not None:
        cls = base
    return cls


def _in_layout_of(plain: type, wanted: type[Adapted], namespace: dict[str, Any]) -> type[Adapted]:
    """Return a class like `wanted` that instances of `plain` can change to.

    Python lets an object change its class only where both derive first from the same layout. Where
    a mixin stands before nn.Module (optimum-quanto's QLinear) ours has to come second among the
    bases, and first in the order in which methods are looked up.
    """
    meta: Any = type("Reordered", (type(plain),), {"mro": lambda cls: [cls, *wanted.__mro__[1:]]})
    bases = wanted.__bases__[::-1]
    found: type[Adapted] = types.new_class(
        plain.__name__, bases, {"metaclass": meta}, lambda ns: ns.update(namespace)
    )
    return found


def _rebuild(plain: type[nn.Module], mixin: type[Adapted], reads: tuple[str, ...]) -> Adapted:
    """Make an empty carrier, for pickle and deepcopy, which then restore its state."""
    made: Adapted = object.__new__(adapted_class(plain, mixin, reads))
    return made


def plain_class(cls: type) -> type:
    """Return a class without our mixin: what the module is to everybody else."""
    if "_lora_plain" in cls.__dict__:
        plain: type = cls.__dict__["_lora_plain"]
        return plain
    if not issubclass(cls, Adapted):
        return cls
    # Somebody (FSDP2) has swapped the class again on top of ours: the same class on plain bases.
    found = _PLAIN.get(cls)
    if found is None:
        bases = tuple(plain_class(b) for b in cls.__bases__)
        namespace = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
        found = _PLAIN[cls] = type(cls.__name__, bases, namespace)
    return found
