"""W + delta of a parameter that is read.

The sum is formed as late as possible: reading a weight's dtype or shape costs nothing and is never
refused.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.functional.factors import Patch, needs_plain_operations
from lora_inject.core.functional.lazy import lazy_weight
from lora_inject.core.functional.torch_inside import is_watched, saving_hooks
from lora_inject.core.functional.torch_stack import in_forward, in_symbolic_trace
from lora_inject.core.functional.weight import effective_weight, reads_as_sum
from lora_inject.core.layers.attached import Attached, Entry, attached_to, held_by
from lora_inject.core.layers.gains import check_mixed, gain_of
from lora_inject.core.layers.moving_buffers import watched
from lora_inject.core.layers.plain_tensors import PLAIN
from lora_inject.core.layers.sending import sent_once
from lora_inject.errors import LayerError, article
from lora_inject.private import look_up

# Older torch has the second only.
_is_tracing: Callable[[], bool] = (
    look_up("torch.fx._symbolic_trace.is_fx_symbolic_tracing")
    or look_up("torch.fx._symbolic_trace.is_fx_tracing")
    or in_symbolic_trace
)


def check_not_symbolic() -> None:
    """Raise in torch.fx.symbolic_trace, whose graph would keep today's W + delta as a constant."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # loads sympy: only in a trace

    if get_proxy_mode() is None and not torch.compiler.is_compiling():  # these run what is read
        raise LayerError(
            "torch.fx.symbolic_trace of a forward that reads a weight",
            "the weight has an adapter, and the graph would hold their sum as a constant",
            "Use torch.export, or call merge(model, eject=True) first",
        )


def _is_of_torch(plain: type[nn.Module]) -> bool:
    """Whether a class is a layer of torch, or derived from one: containers have no parameters."""
    places = [cls.__module__.rpartition(".") for cls in plain.__mro__]
    own = [last for package, _, last in places if package == "torch.nn.modules"]
    return not {*own} <= {"module", "container"}


def read_mixed(
    layer: Any, param: str, raw: Any, taking: list[tuple[Entry, float]], *, outside: bool
) -> Any:
    """Return W + delta, of the entries of a mix that are on a parameter."""
    attached = layer._lora
    if _is_tracing():
        check_not_symbolic()
    if type(raw) not in PLAIN and not reads_as_sum(raw):
        return _other(layer, raw, taking, outside)
    # A value read under no_grad would cut the gradient of a later read in the same forward.
    key = (param, torch.is_grad_enabled(), *taking)
    cache = _read_so_far(attached)
    if cache is None:
        return _effective(layer, raw, taking, outside)
    if key not in cache:
        cache[key] = _effective(layer, raw, taking, outside)
    return cache[key]


def _read_so_far(attached: Attached) -> dict[Any, Tensor] | None:
    """Return the values that were read in the running forward, for the next reads in it.

    None outside a forward of the module, and in a checkpoint that its forward has entered: that
    part is recomputed outside of it, must read the same way there, and has hooks of its own on
    the tensors that it saves.
    """
    if torch.compiler.is_compiling() or not attached.running:
        return None
    cache, then = attached.running.get(threading.get_ident(), (None, None))
    now = saving_hooks()
    return cache if now is then or (now and then and now[0] is then[0]) else None


def _other(layer: Any, raw: Any, taking: list[tuple[Entry, float]], outside: bool) -> Any:
    """Return the value of a sharded or a quantized weight.

    Tensor parallelism computes with shards. Where a quantized weight is read by others than its
    layer, there is no W to add to: only its shape and dtype can be read.
    """
    if hasattr(raw, "full_tensor"):
        return _effective(layer, raw, taking, outside)
    entry = taking[0][0]
    if torch.compiler.is_compiling() or (entry.on_output and not outside):
        return raw

    def used() -> None:
        raise LayerError(
            f"reading {entry.param!r} of a {type(layer).__name__}",
            f"it is {article(type(raw).__name__)}, to which adapter {entry.adapter!r} cannot "
            "be added",
            "Leave this layer out of the adapter, or quantize it before inject",
        )

    stand_in = torch.empty((), dtype=raw.dtype, device=raw.device).expand(raw.shape)
    return _late(stand_in, (), used=used)


def _effective(layer: Any, raw: Tensor, taking: list[tuple[Entry, float]], outside: bool) -> Tensor:
    """Return `W + sum of weight * (copy - W) + sum of weight * scale * B @ A`."""
    held = held_by(layer)
    value = raw
    patches: list[Patch] = []
    float32 = False
    gain = None
    for entry, weight in taking:
        spec = entry.spec
        if spec is None:
            value = trained(entry, value, raw, held[entry.mark], weight)
            continue
        # The weight of a layer keeps its dtype, which the layer's input has.
        if spec.compute == "float32" and spec.kind == "parameter":
            float32 = float32 or not _is_of_torch(layer._lora_plain)
        gain = gain or gain_of(entry, held)
        patches += entry.patches(held, weight)
    if gain is not None:
        check_mixed(taking)

    def used() -> None:
        for entry, _ in taking:
            _is_read(layer, entry)
            # A look at a weight in a notebook is no part of what the model computes.
            new = outside and entry.mark not in layer._lora.read_from_outside
            if new and in_forward():
                noted = layer._lora.read_from_outside  # dynamo of torch 2.9 follows no |=
                layer._lora.read_from_outside = noted | {entry.mark}

    if _is_late(layer, patches, outside):
        how = {"float32": float32, "gain": gain, "any_shape": outside}
        return _late(value, patches, used=used, looks=True, **how)
    used()
    if not patches:
        return value
    return effective_weight(value, patches, float32=float32, gain=gain)


def _is_late(layer: Any, patches: Sequence[Patch], outside: bool) -> bool:
    """Whether a value is formed where it is used: a sum, or what a loader only looks up.

    torch's `set_model_state_dict` asks for each key before it gives the adapter's tensors values.
    """
    # Two statements: dynamo before torch 2.14 traces no `bool()` of a list.
    if not patches and not (outside and layer._lora.garbage):
        return False
    return not needs_plain_operations()


def _is_read(layer: Any, entry: Entry) -> None:
    """Note that an entry takes part, and refuse dropout, which a weight cannot express."""
    if torch.compiler.is_compiling():
        return
    if entry.mark not in layer._lora.took_part:
        layer._lora.used((entry,))
    layer._lora_check_vain(entry.tensors(layer).values())
    if (
        entry.on_output
        and entry.spec
        and entry.spec.dropout
        and layer._lora.selection.current().drops(layer)
    ):
        raise LayerError(
            f"reading the weight of site {entry.spec.name!r} in training",
            f"adapter {entry.adapter!r} has dropout {entry.spec.dropout:g} on the layer's "
            "input, which the reader of a weight does not see",
            "Give the site dropout: 0, or call model.eval() to look at the weight",
        )


def _late(weight: Tensor, patches: Sequence[Patch], **how: Any) -> Tensor:
    """Return a weight with updates, formed where it is used."""
    return lazy_weight(weight, patches, **{"float32": False, **how})


def trained(entry: Entry, value: Tensor, raw: Tensor, copy: Tensor, weight: float) -> Tensor:
    """Return a tensor with the values of an entry without a site added or put in its place."""
    if entry.scale is not None:
        return (value.to(copy.dtype) + weight * entry.scale * copy).to(raw.dtype)
    if entry.rows is not None and hasattr(raw, "full_tensor"):
        problem = "its rows are in several processes, and single ones were to train"
        remedy = "Leave the tokens out, or shard with fully_shard"
        raise LayerError(f"reading {entry.param!r} with its trained rows", problem, remedy)
    index = None if entry.rows is None else _index(entry.rows, raw)
    mixed = copy
    if weight != 1.0 or value is not raw:  # something else was added, too
        before, base = (t if index is None else t[index] for t in (value, raw))
        mixed = before.to(copy.dtype) + weight * (copy - base.to(copy.dtype))
    mixed = mixed.to(raw.dtype)
    return mixed if index is None else value.index_copy(0, index, mixed)


def _index(rows: tuple[int, ...], like: Tensor) -> Tensor:
    """Return row indices as a tensor on the device of another, which is not sent in each forward.

    A fake one, or one that a transform wraps, would outlive its trace.
    """
    plain = type(like) in (nn.Parameter, Tensor)
    if torch.compiler.is_compiling() or (plain and not is_watched()):
        return sent_once(rows, like.device)
    return torch.tensor(rows, device=like.device)


def selected_forward(plain: type[nn.Module], of_mixin: Callable[..., Any]) -> Callable[..., Any]:
    """Return the mixin's forward, by whoever is selected, with the signature of the plain one."""

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return of_mixin(self, *args, **kwargs)

    return forward


def cached_forward(plain: type[nn.Module]) -> Callable[..., Any]:
    """Return the plain forward, in which each effective weight is formed once."""

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        attached = attached_to(self)
        # Without one this bound method was kept and the adapter ejected.
        if attached is None or torch.compiler.is_compiling():
            return plain.forward(self, *args, **kwargs)
        thread = threading.get_ident()
        running = attached.running
        outer, running[thread] = running.get(thread), ({}, saving_hooks())
        try:
            check_buffers = _watched_buffers(self)
            outputs = plain.forward(self, *args, **kwargs)
            if check_buffers is not None:
                check_buffers()
            return outputs
        finally:
            if outer is None:
                del running[thread]
            else:
                running[thread] = outer

    return forward


def _watched_buffers(module: Any) -> Callable[[], None] | None:
    """Return what raises if a forward that trains has moved a buffer of its module."""
    if module._buffers and module.training:
        return watched(module)
    return None
