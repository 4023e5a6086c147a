"""What else a swapped class does like the class below it: move, cast, save, load and register."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.functional.patches import patch
from lora_inject.core.functional.torch_inside import runs_plainly
from lora_inject.core.layers.adapted import Adapted
from lora_inject.core.layers.forms import check_forms, check_put
from lora_inject.core.layers.state_dict import taking
from lora_inject.core.layers.told import tell
from lora_inject.core.layers.upkeep import (
    check_deleted,
    check_registered,
    move,
    refuse_script,
    replica_of,
)


class Carrier(Adapted):
    """The part of a swapped class that looks after the tensors of the module."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move or cast like nn.Module, but never narrow an adapter's float32 masters."""
        move(self, super()._apply, fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save like nn.Module, and note what the tensors do not tell."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        tell(self, destination, prefix)

    @property
    def _lora_forms(self) -> Tensor:
        """The attribute that torch looks for under each key of a state dict, empty but in a call.

        `torch.func.functional_call` puts the values of a dict there, and then what was there.
        """
        return torch.empty(0) if self._lora.put is None else self._lora.put

    @_lora_forms.setter
    def _lora_forms(self, value: Tensor) -> None:
        if value.numel() and runs_plainly():  # else values cannot be read
            check_put(self, value)
        self._lora.put = value if value.numel() else None

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Let a plain base checkpoint load strictly; half an adapter is still missing keys."""
        lists = missing_keys, unexpected_keys
        with taking(self, state_dict, prefix, local_metadata, *lists):
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, *lists, error_msgs
            )

    def extra_repr(self) -> str:
        """Return the plain layer's description and the adapters on it."""
        notes = Counter(f"{e.adapter}: r={e.spec.rank}" for e in self._lora.entries() if e.spec)
        parts = [f"{note} x{n}" if n > 1 else note for note, n in notes.items()]
        adapters = f"lora={{{', '.join(parts)}}}" if parts else ""
        return ", ".join(filter(None, [super().extra_repr(), adapters]))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register like nn.Module, but nothing in the place of an adapted weight, or of A."""
        check_registered(self, name, param)
        super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        """Delete like nn.Module, but not what carries an adapter."""
        if name in self._parameters:
            check_deleted(self, name)
        super().__delattr__(name)

    def _replicate_for_data_parallel(self) -> Any:
        """Make the replica that torch's DataParallel fills, of the swapped class."""
        return replica_of(self)

    def __prepare_scriptable__(self) -> Any:
        """Raise, before torch.jit.script has changed anything."""
        refuse_script(self)


def _asking_first(load: Any) -> Any:
    """Return a `load_state_dict` that looks at the dict before anything is written.

    A module's own hook is called too late, after its predecessors in the parent were written, and
    no module knows its parents.
    """

    @functools.wraps(load)
    def load_state_dict(self: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if any("_lora" in module.__dict__ for module in self.modules()):
            check_forms(self, state_dict)
        return load(self, state_dict, *args, **kwargs)

    return load_state_dict


def _itself(get: Any) -> Any:
    """Return a `get_parameter` that gives a Parameter itself, as `named_parameters` does."""

    @functools.wraps(get)
    def get_parameter(self: nn.Module, target: str) -> nn.Parameter:
        path, _, name = target.rpartition(".")
        owner = self.get_submodule(path)
        held = owner._parameters.get(name) if isinstance(owner, Adapted) else None
        return get(self, target) if held is None else held  # type: ignore[no-any-return]

    return get_parameter


patch(nn.Module, "load_state_dict", _asking_first)
patch(nn.Module, "get_parameter", _itself)
