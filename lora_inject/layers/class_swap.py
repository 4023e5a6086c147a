"""Changing the class of a module that gets its first adapter, its next, or loses its last.

The swapped class is put on and taken off by one assignment, and what others have put on
top of it (FSDP2, hooks that saved the old forward) stays there.
"""

from __future__ import annotations

import types
from collections.abc import Iterable

from torch import nn

from lora_inject.errors import LayerError
from lora_inject.layers.adapted import Adapted, WeightUpdate, adapted_class, plain_class
from lora_inject.layers.attached import Attached, attached_to
from lora_inject.layers.selection import Selection


def swap(
    module: nn.Module, selection: Selection, mixin: type[Adapted], reads: Iterable[str]
) -> Attached:
    """Make `module` carry: change its class, or widen what its swapped class reads.

    Args:
        module: The module; stays the same object.
        selection: The cell of its root.
        mixin: The kind of layer, or `WeightUpdate` where only parameters are read.
        reads: Parameters to be read, beside those that already are.

    Returns:
        Its attached.
    """
    cls = type(module)
    attached = attached_to(module)
    if attached is None:
        attached = module.__dict__["_lora"] = Attached(selection)
        target = adapted_class(cls, mixin, reads)
    else:
        ours = _own_class(cls)
        kind = ours._lora_mixin if mixin is WeightUpdate else mixin
        new = adapted_class(ours._lora_plain, kind, ours._lora_reads.union(reads))
        target = new if ours is cls else _with_base(cls, ours, new)
    if target is not cls:
        # Past nn.Module.__setattr__, which would look for parameters and children of that name.
        object.__setattr__(module, "__class__", target)
    _rebind_hooked_forward(module, attached)
    return attached


def narrow(module: nn.Module) -> None:
    """Let a swapped class read no more parameters than its attached do."""
    attached = attached_to(module)
    assert attached is not None
    cls = type(module)
    ours = _own_class(cls)
    kind = ours._lora_mixin if attached.forward else WeightUpdate
    new = adapted_class(ours._lora_plain, kind, attached.reads)
    if new is not ours:
        module.__class__ = new if ours is cls else _with_base(cls, ours, new)
        _rebind_hooked_forward(module, attached)


def unswap(module: nn.Module) -> None:
    """Give a module its own class back and forget its attached."""
    attached = module.__dict__.pop("_lora")
    if attached.old_forward is not None and "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = attached.old_forward
    left = module.__dict__.get("forward")
    if isinstance(left, types.MethodType) and left.__func__ is type(module).forward:
        # A hook that was removed meanwhile has put our forward back, onto the instance.
        del module.__dict__["forward"]
    module.__class__ = plain_class(type(module))


def _own_class(cls: type) -> type[Adapted]:
    if "_lora_plain" in cls.__dict__:
        return cls
    return next(c for c in cls.__mro__ if "_lora_plain" in c.__dict__)


def _with_base(cls: type, old: type, new: type) -> type:
    """Return `cls` with `old` replaced by `new` among its bases, at any depth."""
    if cls is old:
        return new
    if not issubclass(cls, old):
        return cls
    bases = tuple(_with_base(b, old, new) for b in cls.__bases__)
    namespace = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, namespace)


def _rebind_hooked_forward(module: nn.Module, attached: Attached) -> None:
    """Point accelerate's saved `_old_forward` at the swapped class, which it would bypass."""
    if "forward" in module.__dict__ and "_old_forward" in module.__dict__:
        if attached.old_forward is None:
            attached.old_forward = module.__dict__["_old_forward"]
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)


def check_swappable(module: nn.Module, asked: str) -> None:
    """Check that a module's class can change, by making the class and asking Python.

    Args:
        module: The module; left as it is.
        asked: What was asked, for the message.

    Raises:
        LayerError: It cannot.
    """
    cls = type(module)
    if cls in _SWAPPABLE or issubclass(cls, Adapted):
        return
    try:
        module.__class__ = adapted_class(cls, WeightUpdate, ())
        module.__class__ = cls
    except TypeError as error:
        raise LayerError(
            asked, f"the class of a {cls.__name__} cannot change ({error})", "Leave it out"
        ) from error
    _SWAPPABLE.add(cls)


_SWAPPABLE: set[type] = set()
