"""Kinds of layers from outside the package."""

from __future__ import annotations

from lora_inject.core.layers.adapted import Adapted
from lora_inject.core.layers.kinds import KINDS
from lora_inject.errors import LayerError


def register_kind(row: type[Adapted]) -> type[Adapted]:
    """Add a kind of layer from outside the package; it is asked before the built-in ones.

    Args:
        row: A class with a `kind` of its own, `matches` and `geometry`. Derived from `LoRALinear`
            it adds to the layer's output where its `adds_to_output` says that this is right;
            derived from `WeightUpdate` its weight reads as W + delta. The kind's name travels with
            saved adapters.

    Returns:
        The class, so that this can stand as a decorator.

    Raises:
        LayerError: The class has no kind of its own, or its name is taken by another class.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lora_inject import Geometry, LoRALinear
        >>> from lora_inject.core.layers.kinds import kind_of
        >>> class Dense(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.kernel = nn.Parameter(torch.randn(4, 6))
        ...     def forward(self, x):
        ...         return x @ self.kernel
        >>> @register_kind
        ... class LoRADense(LoRALinear):
        ...     kind, weight_name = "dense", "kernel"
        ...     @classmethod
        ...     def matches(cls, layer):
        ...         return issubclass(layer, Dense)
        ...     @staticmethod
        ...     def geometry(module):
        ...         return Geometry(4, 6, (4, 6), transposed=True)
        >>> kind_of(Dense).kind
        'dense'
        >>> KINDS.remove(LoRADense)
    """
    kind = row.__dict__.get("kind")
    if not kind or not issubclass(row, Adapted):
        raise LayerError(
            f"register_kind({row.__name__})",
            "it is not an Adapted class with a kind of its own",
            "Derive from LoRALinear or WeightUpdate and set kind",
        )
    for other in (each for each in KINDS if each.kind == kind):
        same = (other.__module__, other.__qualname__) == (row.__module__, row.__qualname__)
        if not same:
            raise LayerError(
                f"register_kind({row.__name__})",
                f"kind {kind!r} is taken by {other.__module__}.{other.__qualname__}",
                "Choose another name",
            )
    KINDS[:] = [row, *(other for other in KINDS if other.kind != kind)]
    return row
