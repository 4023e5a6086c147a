"""The swapped class: a module's own class with a mixin to the left of it, made once per class.

One assignment to `__class__` sets or removes it, as in PyTorch's `fully_shard` and `parametrize`.
Classes and hooks that others have put on top of it stay there. `Swapped` does what else a swapped
class has to do like the class below it: move, cast, save, load, register, copy and pickle.
"""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lora_inject.core.functional.lazy import LazyWeight
from lora_inject.core.functional.patches import patch
from lora_inject.core.layers.adapted import Adapted, WeightUpdate, plain_class, with_base
from lora_inject.core.layers.attached import Attached, attached_to, held_by
from lora_inject.core.layers.library import keepers
from lora_inject.core.layers.reading import (
    OWN,
    check_replaced,
    keeping,
    read_attribute,
)
from lora_inject.core.layers.recurrent import members_of_recurrent
from lora_inject.core.layers.selection import Selection
from lora_inject.core.layers.starting import EMPTYING, on_meta
from lora_inject.core.layers.state_dict import taking, tell
from lora_inject.core.layers.weight_kinds import is_quantized
from lora_inject.errors import LayerError


class Swapped(Adapted):
    """Base of every swapped class."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Keep a swapped class from bases that register their subclasses, or want options."""
        if "_lora_plain" not in cls.__dict__:
            super().__init_subclass__(**options)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Become a plain layer: `type(layer)(...)` must not make a carrier without adapters."""
        object.__setattr__(self, "__class__", self._lora_plain)
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
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
        there = self._parameters.get(name)
        assigned = OWN.replaces and OWN.keeps is self._lora
        is_same = param is there or hasattr(param, "full_tensor") or assigned
        if isinstance(param, LazyWeight):  # what prune registers, under another name
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

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save like nn.Module, and note what the tensors do not tell."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        tell(self._lora, destination, prefix)

    @property
    def _lora_forms(self) -> Tensor:
        """The attribute that torch looks for under each key of a state dict."""
        return torch.empty(0)

    @_lora_forms.setter
    def _lora_forms(self, value: Tensor) -> None:
        """Ignore what `torch.func.functional_call` puts there: only loading compares."""

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


def _rebuild(plain: type[nn.Module], mixin: type[Adapted], reads: tuple[str, ...]) -> Adapted:
    """Make an empty carrier, for pickle and deepcopy, which then restore its state."""
    made: Adapted = object.__new__(adapted_class(plain, mixin, reads))
    return made


def _itself(get: Any) -> Any:
    """Return a `get_parameter` that gives a Parameter itself, as `named_parameters` does."""

    @functools.wraps(get)
    def get_parameter(self: nn.Module, target: str) -> nn.Parameter:
        path, _, name = target.rpartition(".")
        owner = self.get_submodule(path)
        held = owner._parameters.get(name) if isinstance(owner, Adapted) else None
        return get(self, target) if held is None else held  # type: ignore[no-any-return]

    return get_parameter


patch(nn.Module, "get_parameter", _itself)

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
    bases = (mixin, Swapped, plain)
    swapped = types.new_class(plain.__name__, bases, exec_body=lambda ns: ns.update(namespace))
    if _layout(plain) is _layout(mixin):
        return swapped
    # Python lets an object change its class only where both derive first from the same layout.
    # Where a mixin stands before nn.Module (quanto's QLinear), ours has to come second among the
    # bases, and first in the order in which methods are looked up.
    order = {"mro": lambda cls: [cls, *swapped.__mro__[1:]]}
    meta: Any = {"metaclass": type("Reordered", (type(plain),), order)}
    return types.new_class(plain.__name__, bases[::-1], meta, lambda ns: ns.update(namespace))


def _with_signature(plain: Any) -> Callable[..., Any]:
    """Return the forward of a class that is read, with the signature of its own."""

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return Adapted.forward(self, *args, **kwargs)

    return forward


_OF_READERS = _with_signature(nn.Module.forward).__code__  # type: ignore[attr-defined]


def _layout(cls: type) -> type:
    """Return the class that the memory layout of a class begins with; usually nn.Module."""
    while (base := cls.__base__) is not object and base is not None:
        cls = base
    return cls


def _resetting(plain: Any) -> Callable[..., Any]:
    """Return the `reset_parameters` of a swapped class, which finds the parameters themselves."""

    @functools.wraps(plain.reset_parameters)
    def reset_parameters(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with keeping(self.__dict__["_lora"]):
            return plain.reset_parameters(self, *args, **kwargs)

    return reset_parameters


# ----------------------------------------------------------------------------- changing the class


def swap(
    module: nn.Module, selection: Selection, mixin: type[Adapted], reads: Iterable[str]
) -> Attached:
    """Make a module carry: change its class, or let its swapped class read further parameters.

    The mixin is the kind of layer, or `WeightUpdate` where only parameters are read.
    """
    attached, ours = attached_to(module), own_class(type(module))
    if attached is None:
        attached = module.__dict__["_lora"] = Attached(selection)
        become(module, attached, ours, mixin, reads)
    else:
        kind = ours._lora_mixin if mixin is WeightUpdate else mixin
        if kind is not ours._lora_mixin or not ours._lora_reads.issuperset(reads):
            become(module, attached, ours._lora_plain, kind, ours._lora_reads.union(reads))
    return attached


def narrow(module: nn.Module) -> None:
    """Let a swapped class read no more parameters than its attached do."""
    attached = attached_to(module)
    assert attached is not None
    if isinstance(module, Adapted):
        ours = own_class(type(module))
        kind = ours._lora_mixin if attached.forward else WeightUpdate
        become(module, attached, ours._lora_plain, kind, attached.reads)


def unswap(module: nn.Module) -> None:
    """Give a module its own class back and forget its attached."""
    attached = module.__dict__.pop("_lora")
    if not isinstance(module, Adapted):
        return  # its class was replaced
    plain = plain_class(type(module))
    if "forward" in module.__dict__:
        _give_forward_back(module, attached, own_class(type(module)), plain)
    module.__class__ = plain


def become(
    module: nn.Module, attached: Attached, plain: Any, mixin: type[Adapted], reads: Iterable[str]
) -> None:
    """Give a module the swapped class of a plain one, below what others have put on top."""
    cls, name = type(module), mixin.weight_name
    held = None if mixin is WeightUpdate else module._parameters.get(name)
    if held is not None and not hasattr(plain, name) and not is_quantized(held):
        reads = {*reads, name}  # others may read the weight of a layer with a forward update
    ours, target = own_class(cls), adapted_class(plain, mixin, reads)
    if cls is not ours:
        target = with_base(cls, ours, target)
    if target is not cls:
        # Past nn.Module.__setattr__, which would look for parameters and children of that name.
        object.__setattr__(module, "__class__", target)
    if "forward" in module.__dict__:
        _rebind_hooked_forward(module, attached, own_class(type(module)))


def own_class(cls: type) -> Any:
    """Return the swapped class that a class derives from, by default itself."""
    if not issubclass(cls, Adapted) or "_lora_plain" in cls.__dict__:
        return cls
    return next(c for c in cls.__mro__ if "_lora_plain" in c.__dict__)


# ------------------------------------------------------------------- forwards that hooks have saved


def _rebind_hooked_forward(module: nn.Module, attached: Attached, ours: Any) -> None:
    """Point the forward that a hook has saved at the swapped class, which it would bypass."""
    for keeper in keepers(module):
        kept = keeper.kept(module)
        if attached.old_forward is None and not _is_ours(kept, ours):
            attached.old_forward = kept
        keeper.keep(module, types.MethodType(type(module).forward, module))


def _give_forward_back(module: nn.Module, attached: Attached, ours: Any, plain: Any) -> None:
    """Let what has saved our forward call that of the plain class, or what it had saved before."""
    for keeper in keepers(module):
        if _is_ours(keeper.kept(module), ours):  # of a hook that came later
            bound = types.MethodType(plain.forward, module)
            keeper.keep(module, attached.old_forward or bound)
    if _is_ours(module.__dict__.get("forward"), ours):
        # A hook that was removed meanwhile has put our forward back, onto the instance.
        del module.__dict__["forward"]


def _is_ours(method: Any, ours: Any) -> bool:
    """Whether a method that somebody saved on a module is the forward of a swapped class."""
    function: Any = getattr(method, "__func__", None)
    if getattr(function, "__code__", None) is not _OF_READERS:
        return function is not None and function is ours._lora_mixin.forward
    return function.__wrapped__ is ours._lora_plain.forward
