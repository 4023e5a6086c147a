"""The tensors of an adapted module that are moved, cast, replaced or replicated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lora_inject.core.layers.attached import Attached, held_by
from lora_inject.core.layers.own_code import OWN
from lora_inject.core.layers.replaced import check_replaced
from lora_inject.core.layers.starting import EMPTYING, moved
from lora_inject.errors import LayerError


def move(layer: Any, apply: Callable[..., Any], fn: Callable[..., Any], recurse: bool) -> None:
    """Move or cast by nn.Module's own `_apply`, but never narrow an adapter's float32 masters."""
    held = (layer._parameters[name] for name in layer._lora.flat)
    masters = {id(t) for p in held if p is not None for t in (p, p.grad)}

    def keep_wide(t: Tensor) -> Tensor:
        out: Tensor = fn(t)
        if out.dtype == t.dtype or id(t) not in masters or out.dtype.itemsize >= 4:
            return out
        return t.to(out.device, torch.float32)

    apply(keep_wide, recurse)
    for name in layer._lora.flat:
        layer._lora.selection.extend_to(held_by(layer)[name].device)
    moved(layer, emptied=getattr(fn, "__code__", None) in EMPTYING)


def check_registered(layer: Any, name: str, param: nn.Parameter | None) -> None:
    """Raise for a Parameter in the place of an adapted weight, or of A.

    What is put there may be the weight with something done to it: quantized, pruned, or fused
    with a norm, of which the update knows nothing.

    1. A parameter that was read and then taken out is put back, and its successor is refused.
    2. In the place of an adapted one stands no other, but its shards, and what
       `load_state_dict` puts there.
    3. An adapted one gets no second name, nor does what was read of it: that is the first step
       of torch's `prune`, which later cannot be undone.
    """
    attached, held = layer._lora, layer._parameters
    weight = (layer.weight_name,) if attached.forward else ()
    loads = OWN.keeps is attached and OWN.replaces and param is not None
    for adapted in (*attached.reads, *weight, *attached.flat):
        if adapted not in held and _put_back(attached, adapted, held):
            check_replaced(layer, adapted)
        there = held.get(adapted)
        if there is not None and not loads and _is_put_wrong(there, param, name == adapted):
            check_replaced(layer, adapted)


def check_deleted(layer: Any, name: str) -> None:
    """Raise for a Parameter that carries an adapter, and may not be deleted."""
    if name in layer._lora.flat or any(entry.param == name for entry in layer._lora.entries()):
        check_replaced(layer, name)


def refuse_script(layer: nn.Module) -> NoReturn:
    """Raise, before torch.jit.script has changed anything."""
    raise LayerError(
        f"torch.jit.script of a {type(layer).__name__}",
        "it carries an adapter, which a script cannot",
        "Call merge(model, eject=True) first, or use torch.jit.trace or torch.export",
    )


def replica_of(layer: Any) -> Any:
    """Return the replica that torch's DataParallel fills, of the swapped class."""
    replica: Any = object.__new__(type(layer))
    replica.__dict__ = {**layer.__dict__, "_parameters": {}, "_is_replica": True}
    replica._buffers, replica._modules = layer._buffers.copy(), layer._modules.copy()
    if (flat := layer.__dict__.get("_flat_weights")) is not None:  # replicas write theirs
        replica.__dict__["_flat_weights"] = flat[:]
    return replica


def _is_put_wrong(adapted: nn.Parameter, given: Any, in_its_place: bool) -> bool:
    """Whether a Parameter may not be registered beside, or in the place of, an adapted one."""
    if in_its_place:
        return given is not adapted and not hasattr(given, "full_tensor")
    return given is adapted or getattr(type(given), "is_read_only", False)


def _put_back(attached: Attached, param: str, parameters: dict[str, Any]) -> bool:
    """Put a parameter back that was taken out after it was read; return whether it was."""
    held = attached.last_read.get(param, lambda: None)()
    if held is None:
        return False
    others = dict(parameters)
    parameters.clear()
    parameters.update({param: held, **others})
    return True
