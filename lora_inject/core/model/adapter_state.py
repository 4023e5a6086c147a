"""Reading an adapter off a live model, as a value: the function for users."""

from __future__ import annotations

from torch import nn

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.read_off import read_off


def adapter_state(model: nn.Module, name: str = "default") -> AdapterState:
    """Read an adapter from a model, as a value.

    Args:
        model: The root, or any module that holds roots.
        name: The adapter.

    Returns:
        Its state. The tensors are detached and share memory with the model's.

    Raises:
        StateError: There is no such adapter, a layer that carries it was replaced, the model is
            merged, or this process holds only a shard of a tensor.

    Examples:
        >>> from lora_inject.core.model.inject import inject
        >>> net = inject(nn.Sequential(nn.Linear(4, 6)), {"rank": 2, "targets": ["0"]})
        >>> site = adapter_state(net).sites["0"]
        >>> tuple(site.A.shape), tuple(site.B.shape), site.scale
        ((2, 4), (6, 2), 8.0)
    """
    return read_off(Survey(model), name)
