"""What else a swapped class does like the class below it: move, cast, save, load and register."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.functional.inside import runs_plainly
from lora_inject.core.layers.adapted import Adapted, raw_parameter
from lora_inject.core.layers.attached import held_by
from lora_inject.core.layers.own_code import OWN
from lora_inject.errors import LayerError


class Carrier(Adapted):
    """The part of a swapped class that looks after the tensors of the module."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move or cast like nn.Module, but never narrow an adapter's float32 masters."""
        from lora_inject.core.layers.valueless import EMPTYING, moved

        held = (self._parameters[name] for name in self._lora.flat)
        masters = {id(t) for p in held if p is not None for t in (p, p.grad)}

        def keep_wide(t: Tensor) -> Tensor:
            out: Tensor = fn(t)
            if out.dtype == t.dtype or id(t) not in masters or out.dtype.itemsize >= 4:
                return out
            return t.to(out.device, torch.float32)

        super()._apply(keep_wide, recurse)  # type: ignore[no-untyped-call]
        for name in self._lora.flat:
            self._lora.selection.extend_to(held_by(self)[name].device)
        moved(self, emptied=getattr(fn, "__code__", None) in EMPTYING)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save like nn.Module, and note what the tensors do not tell."""
        from lora_inject.core.layers.told import tell  # no part of a forward

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
            from lora_inject.core.layers.forms import check_put

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
        from lora_inject.core.layers.state_dict import taking  # no part of a forward

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
        """Register like nn.Module, but nothing in the place of an adapted weight, or of A.

        What is put there may be the weight with something done to it: quantized, pruned, or fused
        with a norm, of which the update knows nothing.

        1. A parameter that was read and then taken out is put back, and its successor is refused.
        2. In the place of an adapted one stands no other, but its shards, and what
           `load_state_dict` puts there.
        3. An adapted one gets no second name, nor does what was read of it: that is the first step
           of torch's `prune`, which later cannot be undone.
        """
        attached, held = self._lora, self._parameters
        weight = (self.weight_name,) if attached.forward else ()
        loads = OWN.keeps is attached and OWN.replaces and param is not None
        for adapted in (*attached.reads, *weight, *attached.flat):
            if adapted not in held and attached.put_back(adapted, held):
                self._lora_check_replaced(adapted)
            there = held.get(adapted)
            if there is not None and not loads and _is_put_wrong(there, param, name == adapted):
                self._lora_check_replaced(adapted)
        super().register_parameter(name, param)

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return a Parameter itself, as `parameters()` yields it."""
        return raw_parameter(self, target)

    def __delattr__(self, name: str) -> None:
        """Delete like nn.Module, but not what carries an adapter."""
        adapted = name in self._lora.flat or any(e.param == name for e in self._lora.entries())
        if name in self._parameters and adapted:
            self._lora_check_replaced(name)
        super().__delattr__(name)

    def _replicate_for_data_parallel(self) -> Any:
        """Make the replica that torch's DataParallel fills, of the swapped class."""
        replica: Any = object.__new__(type(self))
        replica.__dict__ = {**self.__dict__, "_parameters": {}, "_is_replica": True}
        replica._buffers, replica._modules = self._buffers.copy(), self._modules.copy()
        if (flat := self.__dict__.get("_flat_weights")) is not None:  # replicas write theirs
            replica.__dict__["_flat_weights"] = flat[:]
        return replica

    def __prepare_scriptable__(self) -> Any:
        """Raise, before torch.jit.script has changed anything."""
        raise LayerError(
            f"torch.jit.script of a {type(self).__name__}",
            "it carries an adapter, which a script cannot",
            "Call merge(model, eject=True) first, or use torch.jit.trace or torch.export",
        )


def _is_put_wrong(adapted: nn.Parameter, given: Any, in_its_place: bool) -> bool:
    """Whether a Parameter may not be registered beside, or in the place of, an adapted one."""
    if in_its_place:
        return given is not adapted and not hasattr(given, "full_tensor")
    return given is adapted or getattr(type(given), "is_read_only", False)
