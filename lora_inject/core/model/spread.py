"""Tensors of an adapter of which this process may hold only a shard."""

from __future__ import annotations

from torch import Tensor

from lora_inject.core.layers.attached import Entry
from lora_inject.core.model.guards import functions
from lora_inject.errors import StateError


def gathered_whole(tensor: Tensor, entry: Entry, role: str) -> Tensor:
    """Return a tensor of an adapter, gathered where this process holds a shard of it."""
    spec, tensor = entry.spec, tensor.detach()
    if hasattr(tensor, "full_tensor"):
        whole: Tensor = tensor.full_tensor()
        return whole
    shape = entry.shape_of(role)
    if tuple(tensor.shape) != shape:
        contexts = [context for named in functions("gathering") for context in named()]
        raise StateError(
            f"adapter_state of {entry.adapter!r}",
            f"{role} of {spec.name if spec else entry.param!r} has shape {tuple(tensor.shape)} "
            f"instead of {shape}: this process holds a shard of it",
            f"Call it within {' or '.join(contexts) or 'a context that gathers whole tensors'}",
        )
    return tensor
