"""Layers of torch whose weight is read: convolutions and `nn.Bilinear`.

A weight update is right for every layer that reads its weight, whatever it computes with it:
stride, dilation, groups, padding modes. So these kinds only state how their weight is a matrix.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lora_inject.core.layers.adapted import WeightUpdate
from lora_inject.core.spec.sites import Geometry


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
