"""Convolutions under `routed`: the weight stays W, and each row's update is added to the output."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_inject.errors import LayerError
from lora_inject.functional.routed import routed_convolution
from lora_inject.layers.attached import Entry, attached_to, held_by
from lora_inject.layers.routing import routing_of
from lora_inject.layers.selection import State

_STOCK = {
    (kind.forward, kind._conv_forward): convolve
    for kind, convolve in ((nn.Conv1d, F.conv1d), (nn.Conv2d, F.conv2d), (nn.Conv3d, F.conv3d))
}


def adds_rows(plain: type[nn.Module], param: str) -> bool:
    """Whether what a class reads as a parameter can be added to its output for each row."""
    return param == "weight" and (plain.forward, getattr(plain, "_conv_forward", None)) in _STOCK


def routes_rows(plain: type[nn.Module], entry: Entry) -> bool:
    """Whether an adapter that reads a parameter of such a module can be another for each row."""
    plainly = entry.spec is not None and not entry.variant.gained
    return plainly and adds_rows(plain, entry.param)


def with_rows(plain: type[nn.Module], forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a weight update that adds the rows' updates under `routed`."""
    if not adds_rows(plain, "weight"):
        return forward

    @functools.wraps(forward)
    def routed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = forward(self, *args, **kwargs)
        attached = attached_to(self)
        if attached is None or "weight" not in attached.reads:
            return y
        state = attached.selection.current()
        return _added(self, y, args[0] if args else kwargs["input"], state) if state.routed else y

    return routed_forward


def _added(module: Any, y: Tensor, x: Tensor, state: State) -> Tensor:
    """Add to each row of a convolution's output y the update of its own adapter."""
    if x.dim() != module.weight.dim():
        raise LayerError(
            "routed()",
            f"a {type(module).__name__} got one input of shape {tuple(x.shape)} without a batch",
            "Give a batch, of one row if need be",
        )
    attached = attached_to(module)
    assert attached is not None
    by_adapter, held = attached.reads["weight"], held_by(module)
    routing = routing_of(module, by_adapter, x, state)
    if not routing.entries:
        return y
    if not torch.compiler.is_compiling():
        attached.used(routing.entries)
    module._lora_refuse_vain(e.tensor(module, "A") for e in routing.entries)
    plain = type(module)._lora_plain
    convolve = _STOCK[plain.forward, plain._conv_forward]
    padding = module.padding
    if module.padding_mode != "zeros":
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, module.padding_mode), 0

    def by_groups(x: Tensor, weight: Tensor, groups: int) -> Tensor:
        found: Tensor = convolve(
            x, weight, None, module.stride, padding, module.dilation, groups=groups
        )
        return found

    float32 = any(e.spec is not None and e.spec.compute == "float32" for e in routing.entries)
    factors = routing.factors(held, training=module.training)
    shape = held["weight"].shape
    return routed_convolution(y, x, routing.places, factors, by_groups, shape, float32=float32)
