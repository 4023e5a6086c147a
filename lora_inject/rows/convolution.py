"""Convolutions under `routed`: they keep W, and each row's update is added to the output."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lora_inject.core.layers.attached import held_by
from lora_inject.errors import LayerError
from lora_inject.rows.bank import routed_convolution

_STOCK = {
    (kind.forward, getattr(kind, "_conv_forward", None)): convolve
    for kind, convolve in ((nn.Conv1d, F.conv1d), (nn.Conv2d, F.conv2d), (nn.Conv3d, F.conv3d))
}


def adds_rows(plain: type[nn.Module], param: str) -> bool:
    """Whether what a class reads as a parameter can be added to its output for each row."""
    return param == "weight" and (plain.forward, getattr(plain, "_conv_forward", None)) in _STOCK


def convolved(rows: Any, module: Any, x: Tensor) -> Tensor:
    """Return a convolution's output with the update of each row's own adapter."""
    held = held_by(module)
    weight: Tensor = held["weight"]
    if x.dim() != weight.dim():
        raise LayerError(
            rows.asked,
            f"a {type(module).__name__} got one input of shape {tuple(x.shape)} without a batch",
            "Give a batch, of one row if need be",
        )
    routing = rows.routing(module, module._lora.reads.get("weight", {}), x)
    plain = module._lora_plain
    convolve = _STOCK[plain.forward, getattr(plain, "_conv_forward", None)]
    padding = module.padding
    if module.padding_mode != "zeros":
        x = F.pad(x, margins(module), module.padding_mode)
        padding = 0
    how = (module.stride, padding, module.dilation, module.groups)
    y: Tensor = convolve(x, weight, module.bias, *how)
    if not routing.entries:
        return y

    def by_groups(x: Tensor, weight: Tensor, groups: int) -> Tensor:
        out: Tensor = convolve(
            x, weight, None, module.stride, padding, module.dilation, groups=groups
        )
        return out

    specs = [entry.spec for entry in routing.entries]
    float32 = any(spec is not None and spec.compute == "float32" for spec in specs)
    factors = routing.factors(held, training=module.training)
    at = routing.places.rows
    return routed_convolution(y, x, at, factors, by_groups, weight.shape, float32=float32)


def margins(conv: Any) -> list[int]:
    """Return what a convolution pads its input by, in the order of `F.pad`: the last axis first."""
    margins = []
    for axis in reversed(range(len(conv.kernel_size))):
        if conv.padding == "same":
            both = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            margins += [both // 2, both - both // 2]
        else:
            margins += [0 if conv.padding == "valid" else conv.padding[axis]] * 2
    return margins
