"""What `load_state_dict` may put into an injected model.

A plain base checkpoint loads strictly, an adapter that a state dict holds must be whole,
and nothing loads into merged weights, which `unmerge` would write over.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from lora_inject.errors import StateError


class Loading:
    """One call of `load_state_dict`, known by the list of missing keys that it collects."""

    def __init__(self, missing_keys: list[str]) -> None:
        self.missing_keys = missing_keys
        self._forgiven: dict[str, list[str]] = {}
        self._present: set[str] = set()

    def note(self, adapter: str, keys: list[str], *, found: bool) -> None:
        """Note whether a layer, whose tensors of an adapter have these keys, found any of them."""
        if found:
            self._present.add(adapter)
            self.missing_keys.extend(self._forgiven.pop(adapter, ()))
        elif adapter not in self._present:
            self._forgiven.setdefault(adapter, []).extend(keys)
            self.missing_keys[:] = [key for key in self.missing_keys if key not in keys]


@functools.cache
def watch_loading() -> None:
    """Refuse, from now on, `load_state_dict` of modules with merged weights.

    A module's own hook is called too late, after its predecessors in the parent were written, and
    no module knows its parents. So torch's function is wrapped at the first merge of a process.
    """
    load = nn.Module.load_state_dict

    @functools.wraps(load)
    def asked_first(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for module in self.modules():
            refuse_loading(module)
        return load(self, *args, **kwargs)

    nn.Module.load_state_dict = asked_first  # type: ignore[method-assign]


def refuse_loading(module: nn.Module) -> None:
    """Raise if the weights of a module hold a merged adapter."""
    attached = module.__dict__.get("_lora")
    if attached is not None and attached.selection.state.merged:
        raise StateError(
            "load_state_dict",
            "the weights hold a merged adapter, and unmerge would write over what is loaded",
            "Call unmerge(model) first, or eject(model) where the merge kept nothing (undo=False)",
        )
