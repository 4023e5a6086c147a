"""The table of layer kinds: a kind of layer is a class with a row in `KINDS`.

A weight update is right for every layer that reads its weight, whatever it computes with it:
stride, dilation, groups, padding modes. So the kinds in this file only state how their weight is a
matrix. Raw parameters need no kind: the parameter itself is the site.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lora_inject.errors import LayerError
from lora_inject.layers.adapted import Adapted, WeightUpdate
from lora_inject.layers.embedding_kind import LoRAEmbedding
from lora_inject.layers.linear_kinds import LoRAConv1D, LoRALinear
from lora_inject.spec.inventory import Geometry


class LoRAConv(WeightUpdate):
    """Weight update of convolutions: the matrix is `(out, in / groups * kernel)`."""

    kind = "conv"
    classes = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    @staticmethod
    def geometry(module: Any) -> Geometry:
        """Return channels and kernel as the layer states them."""
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        return Geometry(math.prod(shape[1:]), shape[0], shape)


class LoRAConvTranspose(WeightUpdate):
    """Weight update of transposed convolutions: the matrix is `(in, out / groups * kernel)`."""

    kind = "conv_transpose"
    classes = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    @staticmethod
    def geometry(module: Any) -> Geometry:
        """Return channels and kernel as the layer states them."""
        shape = (module.in_channels, module.out_channels // module.groups, *module.kernel_size)
        return Geometry(shape[0], math.prod(shape[1:]), shape, transposed=True)


class LoRABilinear(WeightUpdate):
    """Weight update of `nn.Bilinear`: the matrix is `(out, in1 * in2)`."""

    kind = "bilinear"
    classes = (nn.Bilinear,)

    @staticmethod
    def geometry(module: Any) -> Geometry:
        """Return the widths that the layer states."""
        shape = (module.out_features, module.in1_features, module.in2_features)
        return Geometry(shape[1] * shape[2], shape[0], shape)


# The first row that matches a module is its kind.
KINDS: list[type[Adapted]] = [
    LoRALinear,
    LoRAConv1D,
    LoRAEmbedding,
    LoRAConv,
    LoRAConvTranspose,
    LoRABilinear,
]


def mixin_for(kind: str) -> type[Adapted]:
    """Return the class of a kind."""
    return next(row for row in KINDS if row.kind == kind)


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
        >>> from lora_inject.layers import Geometry
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
        ...     def matches(cls, module):
        ...         return isinstance(module, Dense)
        ...     @staticmethod
        ...     def geometry(module):
        ...         return Geometry(4, 6, (4, 6), transposed=True)
        >>> kind_of(Dense()).kind
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
    for other in KINDS:
        same = (other.__module__, other.__qualname__) == (row.__module__, row.__qualname__)
        if other.kind == kind and not same:
            raise LayerError(
                f"register_kind({row.__name__})",
                f"kind {kind!r} is taken by {other.__module__}.{other.__qualname__}",
                "Choose another name",
            )
    KINDS[:] = [row, *(other for other in KINDS if other.kind != kind)]
    return row


def kind_of(module: nn.Module) -> type[Adapted] | None:
    """Return the first row that matches a module."""
    for row in KINDS:
        if row.matches(module):
            return row
    return None
