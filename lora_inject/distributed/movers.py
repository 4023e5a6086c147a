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
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lora_inject.core.functional.torch_stack import module_calling
from lora_inject.core.layers.swapped_class import READER
from lora_inject.private_needed import needed

_MOVERS = {"torch.distributed.fsdp._flat_param", "torch.distributed.tensor.parallel.style"}
_STATES = "torch.distributed._composable_state._module_state_mapping"

# What FSDP2 keeps of each parameter of a module, by name.
_kept: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def is_moved(module: nn.Module, param: str, held: Tensor) -> bool:
    """Return whether a parameter is a shard of FSDP2, or is read by what moves parameters."""
    if not hasattr(held, "full_tensor"):
        return module_calling(READER) in _MOVERS
    if param not in _kept.get(module, {}):
        for place, name, kept in _all_kept():
            _kept.setdefault(place, {})[name] = kept
    kept = _kept.get(module, {}).get(param)
    return kept is not None and kept.sharded_state.name != "UNSHARDED"


def _all_kept() -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield what `fully_shard` keeps of each parameter, with its modules and names."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    states = needed(_STATES, "reading a weight that is a DTensor")
    for reference in list(states.values()):
        state = reference()
        one = getattr(state, "_fsdp_param_group", None)  # until torch 2.12
        for group in getattr(state, "_fsdp_param_groups", None) or filter(None, [one]):
            for kept in group.fsdp_params:
                info = kept._module_info
                yield info.module, info.param_name, kept
                shared = zip(info.shared_modules, info.shared_param_names, strict=True)
                yield from ((module, name, kept) for module, name in shared)
