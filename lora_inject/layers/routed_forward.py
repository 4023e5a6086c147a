"""Layers whose parameters are read, under `routed`.

A convolution keeps the weight W, and each row's update is added to the output. A layer with a
trained copy runs once for each run of rows, with the tensors of these rows' adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import groupby
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

_ALONE: dict[Callable[..., Any], Callable[..., Tensor]] = {
    nn.Linear.forward: lambda _, x, weight, bias: F.linear(x, weight, bias),
    nn.LayerNorm.forward: lambda m, x, weight, bias: F.layer_norm(
        x, m.normalized_shape, weight, bias, m.eps
    ),
    nn.RMSNorm.forward: lambda m, x, weight, _: F.rms_norm(x, m.normalized_shape, weight, m.eps),
}
"""Forwards that treat the rows of their input alike: module, input, weight and bias to output."""


def adds_rows(plain: type[nn.Module], param: str) -> bool:
    """Whether what a class reads as a parameter can be added to its output for each row."""
    return param == "weight" and (plain.forward, getattr(plain, "_conv_forward", None)) in _STOCK


def routes_rows(module: nn.Module, entry: Entry) -> bool:
    """Whether an adapter that reads a parameter of a module can be another for each row."""
    cls: Any = type(module)
    if entry.spec is not None:
        return not entry.variant.gained and adds_rows(cls._lora_plain, entry.param)
    plainly = entry.rows is None and entry.scale is None and cls._lora_mixin.kind == "reader"
    return plainly and cls._lora_plain.forward in _ALONE


def with_rows(plain: type[nn.Module], forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a weight update that gives the rows their own under `routed`."""
    by_rows = _added if adds_rows(plain, "weight") else _apart
    if by_rows is _apart and plain.forward not in _ALONE:
        return forward

    @functools.wraps(forward)
    def routed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        attached = attached_to(self)
        state = attached.selection.current() if attached is not None and attached.reads else None
        if state is None or not state.routed:
            return forward(self, *args, **kwargs)
        x = args[0] if args else kwargs["input"]
        if by_rows is _apart and state.packs(x):
            y = by_rows(self, forward, x.flatten(0, 1), state)
            return y.reshape(*x.shape[:-1], y.shape[-1])
        return by_rows(self, forward, x, state)

    return routed_forward


def _apart(module: Any, forward: Callable[..., Any], x: Tensor, state: State) -> Tensor:
    """Run a layer for each run of rows, with what their adapter has trained of it."""
    attached, held = attached_to(module), held_by(module)
    assert attached is not None
    assert state.rows is not None
    entries = [table[n] for table in attached.reads.values() for n in state.parts if n in table]
    if not entries or any(entry.spec is not None for entry in entries):
        plainly: Tensor = forward(module, x)  # in which reading a weight says what cannot be
        return plainly
    if torch.compiler.is_compiling():  # dynamo cannot raise our exception: it shows the text
        raise RuntimeError("A layer that adapters train in full cannot be routed in a graph.")
    routing_of(module, {}, x, state)  # which checks the number of rows
    attached.used(entries)
    module._lora_refuse_vain(held[entry.mark] for entry in entries)
    repeat = x.shape[0] // len(state.rows)
    runs = [(name, repeat * len(list(rows))) for name, rows in groupby(state.rows)]
    found = []
    for (name, _), part in zip(runs, torch.split(x, [n for _, n in runs]), strict=True):
        tensors = []
        for param in ("weight", "bias"):
            raw, entry = held.get(param), attached.reads.get(param, {}).get(name or "")
            tensors.append(raw if entry is None or raw is None else held[entry.mark].to(raw.dtype))
        found.append(_ALONE[type(module)._lora_plain.forward](module, part, *tensors))
    return torch.cat(found)


def _added(module: Any, forward: Callable[..., Any], x: Tensor, state: State) -> Tensor:
    """Add to each row of a convolution's output the update of its own adapter."""
    y: Tensor = forward(module, x)
    if x.dim() != module.weight.dim():
        raise LayerError(
            "routed()",
            f"a {type(module).__name__} got one input of shape {tuple(x.shape)} without a batch",
            "Give a batch, of one row if need be",
        )
    attached = attached_to(module)
    assert attached is not None
    by_adapter, held = attached.reads.get("weight", {}), held_by(module)
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
