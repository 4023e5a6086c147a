"""Layers whose parameters are read, under `routed`.

A convolution keeps the weight W, and each row's update is added to the output. A layer with a
trained copy runs once for each run of rows, with the tensors of these rows' adapter.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lora_inject.core.layers.attached import Entry, attached_to, held_by
from lora_inject.core.layers.contexts import within
from lora_inject.core.layers.selection import State
from lora_inject.errors import LayerError
from lora_inject.rows.routed import routed_convolution
from lora_inject.rows.routing import routing_of
from lora_inject.trials.expert_rows import by_expert, sorts_tokens

_STOCK = {
    (kind.forward, kind._conv_forward): convolve
    for kind, convolve in ((nn.Conv1d, F.conv1d), (nn.Conv2d, F.conv2d), (nn.Conv3d, F.conv3d))
}

_ROWWISE = {nn.Linear.forward, nn.LayerNorm.forward, nn.RMSNorm.forward}
"""Forwards that treat the rows of their input alike."""


def adds_rows(plain: type[nn.Module], param: str) -> bool:
    """Whether what a class reads as a parameter can be added to its output for each row."""
    return param == "weight" and (plain.forward, getattr(plain, "_conv_forward", None)) in _STOCK


def adds_bias(cls: Any, param: str) -> bool:
    """Whether what a swapped class reads as its bias can be added to its output for each row."""
    return param == "bias" and cls._lora_mixin.kind in {"linear", "conv1d"}


def routes_rows(module: nn.Module, entry: Entry) -> bool:
    """Whether an adapter that reads a parameter of a module can be another for each row."""
    cls: Any = type(module)
    if entry.spec is not None:
        return not entry.variant.gained and adds_rows(cls._lora_plain, entry.param)
    if adds_bias(cls, entry.param):
        return True
    return entry.rows is None and entry.scale is None and cls._lora_plain.forward in _ROWWISE


def runs_apart(module: Any) -> bool:
    """Whether a module can run for the rows of each adapter by themselves, as far as is known now.

    Its forward takes one tensor, or the tensors of a stack of experts, which have its tokens first.
    """
    cls = type(module)
    if sorts_tokens(module):
        return True
    needed = [
        p
        for p in inspect.signature(cls._lora_plain.forward).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    stacked = any(e.spec is not None and e.spec.experts for e in module._lora.entries())
    return len(needed) == 2 and not stacked and not isinstance(module, nn.RNNBase)


def with_rows(plain: type[nn.Module], forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a weight update that gives the rows their own under `routed`."""
    adds, rowwise = adds_rows(plain, "weight"), plain.forward in _ROWWISE

    @functools.wraps(forward)
    def routed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        attached = attached_to(self)
        if attached is None or not attached.reads:
            return forward(self, *args, **kwargs)
        state = attached.selection.current()
        if not state.routed or state.alone:
            return forward(self, *args, **kwargs)
        entries = [table[n] for table in attached.reads.values() for n in state.parts if n in table]
        if adds and all(e.spec is not None and not e.variant.gained for e in entries):
            return _added(self, forward, args[0] if args else kwargs["input"], state)
        known = rowwise and all(entry.spec is None for entry in entries)
        if not entries or not (known or state.one_pass is not None):
            return forward(self, *args, **kwargs)  # where reading a weight says what cannot be
        return apart(self, functools.partial(forward, self), state, args, kwargs)

    return routed_forward


def apart(
    module: Any,
    forward: Callable[..., Any],
    state: State,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a forward for each run of rows of one adapter, under that adapter alone.

    Raises:
        LayerError: The tensors that it takes or returns do not have these rows first.
    """
    if torch.compiler.is_compiling():  # dynamo cannot raise our exception: it shows the text
        raise RuntimeError("A layer that adapters train in full cannot be routed in a graph.")
    given, form = tree_flatten((args, kwargs))
    tensors = [t for t in given if isinstance(t, Tensor)]
    if not tensors:
        _refuse_apart(module, "takes", given)
    x, rows, selection = tensors[0], state.rows or (), module._lora.selection
    dim = int(state.packs(x))
    if not dim:
        routing_of(module, {}, x, state)  # which checks the number of rows
    sorts = sorts_tokens(module)
    if (len(tensors) > 1 and not sorts) or any(
        t.shape[dim : dim + 1] != x.shape[dim : dim + 1] for t in tensors
    ):
        _refuse_apart(module, "takes", tensors)
    repeat = x.shape[dim] // len(rows)
    runs = [(name, len(list(each))) for name, each in groupby(rows)]
    sizes = [repeat * n for _, n in runs]
    if sorts and len(runs) > 1 and not dim:
        of_tokens = [(name, n) for (name, _), n in zip(runs, sizes, strict=True)]
        if (mine := by_expert(module, of_tokens, args, kwargs)) is not None:
            return mine
    columns = [
        torch.split(t, sizes, dim) if isinstance(t, Tensor) else (t,) * len(runs) for t in given
    ]
    outputs, axes = [], []
    for (name, n), part in zip(runs, zip(*columns, strict=True), strict=True):
        key = (name, n)
        if key not in state.kept:
            state.kept[key] = selection.prepared(state.of(name, n))
        with within({selection: state.kept[key]}):
            args, kwargs = tree_unflatten(list(part), form)
            found, of_output = tree_flatten(forward(*args, **kwargs))
        one = next(t for t in part if isinstance(t, Tensor))
        axes = [_axis(t, one, dim) for t in found]
        if -1 in axes:
            _refuse_apart(module, "returns", found)
        outputs.append(found)
    whole = [torch.cat(each, i) for each, i in zip(zip(*outputs, strict=True), axes, strict=True)]
    return tree_unflatten(whole, of_output)


def _axis(output: Any, x: Tensor, dim: int) -> int:
    """Return where an output has the rows that its input has along `dim`; -1 for nowhere."""
    if not isinstance(output, Tensor) or not output.dim():
        return -1
    if x.dim() > 2 and len(output) == x.shape[:2].numel():
        return 0  # rows and positions as one
    return dim if output.shape[dim : dim + 1] == x.shape[dim : dim + 1] else -1


def _refuse_apart(module: nn.Module, verb: str, values: Sequence[Any]) -> NoReturn:
    shown = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in values]
    raise LayerError(
        f"rows with weights of their own in a {type(module).__name__}",
        f"its forward {verb} {', '.join(map(str, shown))}, which cannot be told apart by row",
        "Leave it out of the adapters, or train each alone",
    )


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
    module._lora_refuse_vain(t for e in routing.entries for t in e.tensors(module).values())
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
