"""Tensors of an adapter, and of its base, of which this process may hold only a shard."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.library import loaded_libraries
from lora_inject.errors import StateError


def gathered_whole(tensor: Tensor, entry: Entry, role: str) -> Tensor:
    """Return a tensor of an adapter, gathered where this process holds a shard of it."""
    spec, tensor = entry.spec, tensor.detach()
    if hasattr(tensor, "full_tensor"):
        whole: Tensor = tensor.full_tensor()
        return whole
    shape = entry.shape_of(role)
    if tuple(tensor.shape) != shape:
        raise StateError(
            f"adapter_state of {entry.adapter!r}",
            f"{role} of {spec.name if spec else entry.param!r} has shape {tuple(tensor.shape)} "
            f"instead of {shape}: this process holds a shard of it",
            _remedy(),
        )
    return tensor


def refuse_empty_base(weights: Mapping[str, Tensor], adapter: str) -> None:
    """Raise for a frozen weight whose elements are elsewhere: a fingerprint of it fits no base."""
    name = next(name for name, weight in weights.items() if not weight.numel())
    raise StateError(
        f"adapter_state of {adapter!r}",
        f"its base, {name!r}, has no elements in this process, which holds a shard of it",
        _remedy(),
    )


def _remedy() -> str:
    contexts = [context for library in loaded_libraries() for context in library.gathering()]
    return f"Call it within {' or '.join(contexts) or 'a context that gathers whole tensors'}"
