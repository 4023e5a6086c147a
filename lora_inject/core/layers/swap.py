"""Changing the class of a module: one assignment to `__class__` sets or removes it.

PyTorch's `fully_shard` and `parametrize` work so, too. Classes and hooks that others have put on
top of it stay there.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
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


OLD_FORWARD = "_old_forward"
"""Where accelerate's hooks keep the forward of before, which they call."""


def _rebind_hooked_forward(module: nn.Module, attached: Attached, ours: Any) -> None:
    """Point the forward that a hook has saved at the swapped class, which it would bypass."""
    kept = module.__dict__.get(OLD_FORWARD)
    if kept is not None:
        if attached.old_forward is None and not _is_ours(kept, ours):
            attached.old_forward = kept
        module.__dict__[OLD_FORWARD] = types.MethodType(type(module).forward, module)


def _give_forward_back(module: nn.Module, attached: Attached, ours: Any, plain: Any) -> None:
    """Let what has saved our forward call that of the plain class, or what it had saved before."""
    if _is_ours(module.__dict__.get(OLD_FORWARD), ours):  # of a hook that came later
        bound = types.MethodType(plain.forward, module)
        module.__dict__[OLD_FORWARD] = attached.old_forward or bound
    if _is_ours(module.__dict__.get("forward"), ours):
        # A hook that was removed meanwhile has put our forward back, onto the instance.
        del module.__dict__["forward"]


def _is_ours(method: Any, ours: Any) -> bool:
    """Whether a method that somebody saved on a module is the forward of a swapped class."""
    function: Any = getattr(method, "__func__", None)
    if getattr(function, "__code__", None) is not OF_READERS:
        return function is not None and function is ours._lora_mixin.forward
    return function.__wrapped__ is ours._lora_plain.forward
