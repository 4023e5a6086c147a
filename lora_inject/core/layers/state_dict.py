"""How a module with adapters takes its part of a state dict.

Of an adapter a dict may lack all keys, as a plain base checkpoint does, or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.forms import check_part
from lora_inject.core.layers.own_code import keeping
from lora_inject.core.layers.selection import Selection
from lora_inject.core.layers.starting import names_given, start_loaded
from lora_inject.core.layers.told import FORMS


class Loading:
    """One call of `load_state_dict`, known by the list of missing keys that it collects."""

    def __init__(self, missing_keys: list[str]) -> None:
        self.missing_keys = missing_keys
        self._forgiven: dict[str, list[str]] = {}
        self._present: set[str] = set()

    def note(self, adapter: str, keys: list[str], *, any_there: bool) -> None:
        """Note the keys of a layer's tensors of an adapter, and whether any of them is there."""
        if any_there:
            self._present.add(adapter)
            self.missing_keys.extend(self._forgiven.pop(adapter, ()))
        elif adapter not in self._present:
            self._forgiven.setdefault(adapter, []).extend(keys)
            self.missing_keys[:] = [key for key in self.missing_keys if key not in keys]


@contextmanager
def taking(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    noted: Mapping[str, Any],
    missing_keys: list[str],
    unexpected_keys: list[str],
) -> Iterator[None]:
    """Check a module's part of a state dict, let it be loaded inside, and say what was missing."""
    check_part(module, prefix, state_dict, noted)
    attached = attached_to(module)
    assert attached is not None
    waits = bool(attached.valueless or attached.by_reset)
    if waits:
        given = names_given(module, state_dict, prefix)
    with keeping(attached, replaces=True):
        yield
    if waits:
        start_loaded(module, given)
    unexpected_keys[:] = [key for key in unexpected_keys if key != prefix + FORMS]
    by_adapter: dict[str, list[str]] = {}
    for entry in attached.entries():
        by_adapter.setdefault(entry.adapter, []).extend(prefix + n for n in entry.names.values())
    loading = _loading(attached.selection, missing_keys)
    for adapter, keys in by_adapter.items():
        loading.note(adapter, keys, any_there=any(key in state_dict for key in keys))


def _loading(selection: Selection, missing_keys: list[str]) -> Loading:
    """Return what is known of the call of `load_state_dict` that collects `missing_keys`."""
    known: Loading | None = selection.loading
    if known is None or known.missing_keys is not missing_keys:
        known = selection.loading = Loading(missing_keys)
    return known
