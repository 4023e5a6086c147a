"""When torch.distributed moves a parameter of a module, and must find it as it is.

FSDP2 looks at its shards through the attributes of modules (`FSDPParam.reset_sharded_param`). Its
states say which parameter of which module is a shard at this moment. Other DTensors are those of
tensor parallelism, which computes with them. What makes them, and FSDP1, which moves views in the
middle of what computes with the same ones, are known by the module whose code reads.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping

from lora_inject.core.functional.torch_inside import module_calling
from lora_inject.core.layers.adapted import READER

_MOVERS = {"torch.distributed.fsdp._flat_param", "torch.distributed.tensor.parallel.style"}

# What FSDP2 keeps of each parameter of a module, by name. It holds the module: so weakly.
_kept: WeakKeyDictionary[nn.Module, dict[str, ref[Any]]] = WeakKeyDictionary()


def is_moved(module: nn.Module, param: str, held: Tensor) -> bool:
    """Return whether a parameter is a shard of FSDP2, or is read by what moves parameters."""
    if not hasattr(held, "full_tensor"):
        return module_calling(READER) in _MOVERS
    if param not in _kept.get(module, {}):
        for group in groups():
            for place, name, kept in held_by_group(group):
                _kept.setdefault(place, {})[name] = ref(kept)
    found = _kept.get(module, {}).get(param)
    kept = None if found is None else found()
    return kept is not None and kept.sharded_state.name != "UNSHARDED"


def groups() -> Iterator[Any]:
    """Yield the groups of parameters that `fully_shard` has made."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    for reference in list(_module_state_mapping.values()):
        state = reference()
        one = getattr(state, "_fsdp_param_group", None)  # until torch 2.12
        yield from getattr(state, "_fsdp_param_groups", None) or filter(None, [one])


def held_by_group(group: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield what a group keeps of each parameter, with its modules and names."""
    for kept in group.fsdp_params:
        info = kept._module_info
        yield info.module, info.param_name, kept
        shared = zip(info.shared_modules, info.shared_param_names, strict=True)
        yield from ((module, name, kept) for module, name in shared)
