"""What must hold around a verb because another library is there: one row for each guard.

A row's module is imported only where the process has loaded one of the modules that it is about.
Which functions a guard may have says `core.model.guards`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

GUARDS: dict[str, tuple[str, ...]] = {
    "lora_inject.integrations.transformers": ("transformers",),
    # Names that older versions of transformers gave to a model's tensors.
    "lora_inject.formats.older_names": ("transformers",),
    # Methods of a model that stand for something else while it has adapters.
    "lora_inject.integrations.stand_ins": ("transformers", "diffusers", "huggingface_hub"),
    # Tensors that are spread over processes.
    "lora_inject.distributed.sharding": (
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "deepspeed",
    ),
}
"""Guard, and what has to be loaded, any of it."""

IN_A_GROUP = "lora_inject.distributed.sharding"
"""The guard that every process of a group asks, whatever is loaded."""


def guards() -> Iterator[Any]:
    """Yield the guards of what this process has loaded."""
    for guard, libraries in GUARDS.items():
        is_there = any(library in sys.modules for library in libraries)
        if is_there or (guard == IN_A_GROUP and _is_in_a_group()):
            yield import_module(guard)


def _is_in_a_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
