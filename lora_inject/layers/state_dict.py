"""What `load_state_dict` may put into an injected model.

A plain base checkpoint loads strictly, an adapter that a state dict holds must be whole,
and nothing loads into merged weights, which `unmerge` would write over.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_inject.errors import StateError


class Loading:
    """One call of `load_state_dict`.

    Attributes:
        missing_keys: The list that torch collects, one for each call.
    """

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


def refuse_loading(root: nn.Module) -> None:
    """Refuse `load_state_dict` on a root, before its first tensor, until `allow_loading`."""
    root.register_load_state_dict_pre_hook(raise_merged)  # type: ignore[no-untyped-call]


def allow_loading(root: nn.Module) -> None:
    """Take the refusal away."""
    hooks = root._load_state_dict_pre_hooks
    for key in [k for k, hook in hooks.items() if getattr(hook, "hook", hook) is raise_merged]:
        del hooks[key]


def raise_merged(*_: Any) -> None:
    """Raise that the weights hold a merged adapter.

    Raises:
        StateError: Always.
    """
    raise StateError(
        "load_state_dict",
        "the weights hold a merged adapter, and unmerge would write over what is loaded",
        "Call unmerge(model) first",
    )
