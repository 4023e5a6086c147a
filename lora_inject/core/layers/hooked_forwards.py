"""Forwards of adapted modules that a library has saved on the instance, to call them itself."""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from lora_inject.core.layers.attached import Attached
from lora_inject.core.layers.effective import selected_forward
from lora_inject.core.layers.forwards import keepers

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
