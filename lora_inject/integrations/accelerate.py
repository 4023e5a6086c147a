"""accelerate: hooks around the forwards of instances, which move inputs and offload weights.

A hook keeps the forward of before as `_old_forward` and calls it; who removes the hook puts it back
(`accelerate/hooks.py: add_hook_to_module`).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lora_inject.core.layers.library import Library

_HOOK = "_hf_hook"


class Accelerate(Library):
    """A hook on a module, or several as one (SequentialHook)."""

    modules = ("accelerate.hooks",)

    def offloads(self, module: nn.Module) -> bool:
        """Return whether one of the module's hooks offloads."""
        hook = module.__dict__.get(_HOOK)
        return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))

    def away(self, modules: Iterable[nn.Module]) -> tuple[str, str] | None:
        """Return why, if the model has a hook anywhere: one may place the weights of children."""
        if not any(_HOOK in module.__dict__ for module in modules):
            return None
        remedy = "Inject before dispatch_model, or load the model without offload"
        return "accelerate has offloaded its weights", remedy
