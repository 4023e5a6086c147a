"""Changing the class of a module: one assignment to `__class__` sets or removes it.

PyTorch's `fully_shard` and `parametrize` work so, too. Classes and hooks that others have put on
top of it stay there.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from lora_inject.core.layers.adapted import (
    OF_READERS,
    Adapted,
    WeightUpdate,
    adapted_class,
    plain_class,
    with_base,
)
from lora_inject.core.layers.attached import Attached, attached_to
from lora_inject.core.layers.selection import Selection
from lora_inject.core.layers.weight_kinds import is_quantized


def swap(
    module: nn.Module, selection: Selection, mixin: type[Adapted], reads: Iterable[str]
) -> Attached:
    """Make a module carry: change its class, or let its swapped class read further parameters.

    The mixin is the kind of layer, or `WeightUpdate` where only parameters are read.
    """
    attached, ours = attached_to(module), own_class(type(module))
    if attached is None:
        attached = module.__dict__["_lora"] = Attached(selection)
        become(module, ours, mixin, reads)
    else:
        kind = ours._lora_mixin if mixin is WeightUpdate else mixin
        if kind is not ours._lora_mixin or not ours._lora_reads.issuperset(reads):
            become(module, ours._lora_plain, kind, ours._lora_reads.union(reads))
    return attached


def narrow(module: nn.Module) -> None:
    """Let a swapped class read no more parameters than its attached do."""
    attached = attached_to(module)
    assert attached is not None
    if isinstance(module, Adapted):
        ours = own_class(type(module))
        kind = ours._lora_mixin if attached.forward else WeightUpdate
        become(module, ours._lora_plain, kind, attached.reads)


def unswap(module: nn.Module) -> None:
    """Give a module its own class back and forget its attached."""
    if not isinstance(module, Adapted):  # its class was replaced
        del module.__dict__["_lora"]
        return
    plain: Any = plain_class(type(module))
    if "forward" in module.__dict__:
        point_hook(module, plain.forward)
        if _is_ours(module.__dict__["forward"]):  # a hook that was removed has put it there
            del module.__dict__["forward"]
    del module.__dict__["_lora"]
    module.__class__ = plain


def become(
    module: nn.Module, plain: type[nn.Module], mixin: type[Adapted], reads: Iterable[str]
) -> None:
    """Give a module the swapped class of a plain one, below what others have put on top."""
    cls, name = type(module), mixin.weight_name
    held = None if mixin is WeightUpdate else module._parameters.get(name)
    if held is not None and not hasattr(plain, name) and not is_quantized(held):
        reads = {*reads, name}  # others may read the weight of a layer with a forward update
    ours, target = own_class(cls), adapted_class(plain, mixin, reads)
    if cls is not ours:
        target = with_base(cls, ours, target)
    if "forward" in module.__dict__:
        point_hook(module, target.forward)
    if target is not cls:
        # Past nn.Module.__setattr__, which would look for parameters and children of that name.
        object.__setattr__(module, "__class__", target)


def own_class(cls: type) -> Any:
    """Return the swapped class that a class derives from, by default itself."""
    if not issubclass(cls, Adapted) or "_lora_plain" in cls.__dict__:
        return cls
    return next(c for c in cls.__mro__ if "_lora_plain" in c.__dict__)


# ------------------------------------------------------------------- forwards that hooks have saved


OLD_FORWARD = "_old_forward"
"""Where accelerate's hooks keep the forward of before, which they call."""


def point_hook(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let a hook that has saved the forward of a module's class call another one.

    It would bypass the swapped class, and stay with it after that is gone. What was saved before
    inject is put back as it was.
    """
    kept, attached = module.__dict__.get(OLD_FORWARD), attached_to(module)
    if is_of_class(kept, module):
        old = None if attached is None else attached.old_forward
        if attached is not None and not _is_ours(kept):
            attached.old_forward = kept
        is_old = old is not None and old.__func__ is forward
        module.__dict__[OLD_FORWARD] = old if is_old else types.MethodType(forward, module)


def is_of_class(method: Any, module: nn.Module) -> bool:
    """Return whether a method that somebody saved is the forward of a module's class."""
    if getattr(method, "__self__", None) is not module:
        return False
    plain: Any = plain_class(type(module))
    return _is_ours(method) or method.__func__ is plain.forward


def _is_ours(method: Any) -> bool:
    function = getattr(method, "__func__", None)
    return getattr(function, "__code__", None) in (OF_READERS, Adapted.forward.__code__)
