"""What `load_state_dict` may put into an injected model.

A plain base checkpoint loads strictly, an adapter that a state dict holds must be whole,
and nothing loads into merged weights, which `unmerge` would write over.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lora_inject.errors import StateError


class Loading:
    """One call of `load_state_dict`, known by the list of missing keys that it collects."""

    def __init__(self, missing_keys: list[str]) -> None:
        self.missing_keys = missing_keys
        self._forgiven: dict[str, list[str]] = {}
        self._present: set[str] = set()

    def absent(self, adapter: str, keys: list[str]) -> None:
        """A layer found none of its tensors of this adapter."""
        if adapter not in self._present:
            self._forgiven.setdefault(adapter, []).extend(keys)
            self.missing_keys[:] = [key for key in self.missing_keys if key not in keys]

    def present(self, adapter: str) -> None:
        """A layer found some of its tensors of this adapter."""
        self._present.add(adapter)
        self.missing_keys.extend(self._forgiven.pop(adapter, ()))


def refuse_loading(modules: Iterable[nn.Module]) -> None:
    """Refuse `load_state_dict` on modules, before the first tensor, until `allow_loading`."""
    for module in modules:
        module.register_load_state_dict_pre_hook(_refuse_merged)  # type: ignore[no-untyped-call]


def allow_loading(modules: Iterable[nn.Module]) -> None:
    """Take the refusal away."""
    for hooks in (module._load_state_dict_pre_hooks for module in modules):
        for key in [
            k for k, hook in hooks.items() if getattr(hook, "hook", hook) is _refuse_merged
        ]:
            del hooks[key]


def _refuse_merged(module: nn.Module, _state_dict: Any, prefix: str, *_: Any) -> None:
    """Raise where weights inside hold a merged adapter.

    torch loads module by module and asks no parent of the merged model before: what stands first
    in a parent that no merge saw is loaded by now, which the message says.
    """
    carried = (inner.__dict__.get("_lora") for inner in module.modules())
    if all(attached is None or attached.selection.merged is None for attached in carried):
        return  # a part of the module was ejected, and nobody knew of the module
    inside = f", then load again: what the caller has before {prefix[:-1]!r} is loaded already"
    raise StateError(
        "load_state_dict",
        "the weights hold a merged adapter, and unmerge would write over what is loaded",
        "Call unmerge(model) first" + (inside if prefix else ""),
    )
