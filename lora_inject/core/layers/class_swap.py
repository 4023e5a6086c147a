"""Change the class of a module that gets its first or next adapter, or loses its last.

One assignment sets or removes the swapped class. Classes and hooks that others have put on top of
it (`fully_shard`, hooks that saved the old forward) stay there.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from torch import nn

from lora_inject.core.layers.adapted import Adapted, WeightUpdate, plain_class, with_base
from lora_inject.core.layers.attached import Attached, attached_to, check_class_kept
from lora_inject.core.layers.effective import selected_forward
from lora_inject.core.layers.forwards import keepers
from lora_inject.core.layers.plain_tensors import is_quantized
from lora_inject.core.layers.selection import Selection
from lora_inject.core.layers.swapped_class import adapted_class
from lora_inject.errors import LayerError


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
        give_forward_back(module, attached, own_class(type(module)), plain)
    module.__class__ = plain


def become(
    module: nn.Module, attached: Attached, plain: Any, mixin: type[Adapted], reads: Iterable[str]
) -> None:
    """Give a module the swapped class of a plain one, below what others have put on top."""
    cls = type(module)
    if _holds_plain_weight(module, plain, mixin):
        reads = {*reads, mixin.weight_name}
    ours, target = own_class(cls), adapted_class(plain, mixin, reads)
    if cls is not ours:
        target = with_base(cls, ours, target)
    if target is not cls:
        # Past nn.Module.__setattr__, which would look for parameters and children of that name.
        object.__setattr__(module, "__class__", target)
    if "forward" in module.__dict__:
        rebind_hooked_forward(module, attached, own_class(type(module)))


def _holds_plain_weight(module: nn.Module, plain: type, mixin: type[Adapted]) -> bool:
    """Whether a layer with a forward update holds the weight that others may read."""
    held = None if mixin is WeightUpdate else module._parameters.get(mixin.weight_name)
    if held is None or hasattr(plain, mixin.weight_name):
        return False
    return not is_quantized(held)


def own_class(cls: type) -> Any:
    """Return the swapped class that a class derives from, by default itself."""
    if not issubclass(cls, Adapted) or "_lora_plain" in cls.__dict__:
        return cls
    return next(c for c in cls.__mro__ if "_lora_plain" in c.__dict__)


def check_swappable(module: nn.Module, mixin: type[Adapted], asked: str) -> None:
    """Check that a module's class can change, by making the class and asking Python."""
    check_class_kept(module, asked)
    cls = type(module)
    if cls in _SWAPPABLE or issubclass(cls, Adapted):
        return
    try:
        module.__class__ = adapted_class(cls, mixin, ())
        module.__class__ = cls
    except TypeError as error:
        raise LayerError(
            asked, f"the class of a {cls.__name__} cannot change ({error})", "Leave it out"
        ) from error
    _SWAPPABLE.add(cls)


_SWAPPABLE: WeakSet[type] = WeakSet()


# Module whose functions wrap a plain forward; `functools.wraps` hides that from `__module__`.
_WRITES_FORWARDS = selected_forward.__globals__["__name__"]


def rebind_hooked_forward(module: nn.Module, attached: Attached, ours: Any) -> None:
    """Point the forward that a hook has saved at the swapped class, which it would bypass."""
    for keeper in keepers(module):
        kept = keeper.kept(module)
        if attached.old_forward is None and not _is_ours(kept, ours):
            attached.old_forward = kept
        keeper.keep(module, types.MethodType(type(module).forward, module))


def give_forward_back(module: nn.Module, attached: Attached, ours: Any, plain: Any) -> None:
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
    function = getattr(method, "__func__", None)
    if function is None or function is ours._lora_mixin.forward:
        return function is not None
    plain = function
    while getattr(plain, "__globals__", {}).get("__name__") == _WRITES_FORWARDS:
        plain = plain.__wrapped__
    return plain is not function and plain is ours._lora_plain.forward
