"""Which keys of an adapter a state dict may lack: all, as a plain base checkpoint does, or none."""

from __future__ import annotations


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
