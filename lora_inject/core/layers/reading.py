"""Who reads an adapted parameter, and what it reads as.

The rule: the attribute of an adapted parameter reads as W + delta, for whoever reads it.

| who asks | gets | by |
|---|---|---|
| `parameters()`, `state_dict()`, `_parameters` | the parameter | nn.Module |
| code that keeps or writes the parameters (`keeping`) | the parameter | `read_attribute` |
| a library that moves or rounds a parameter | the parameter | `read_attribute` |
| the forward to whose output the update is added | W, with what is read alone | `_lora_own` |
| a layer whose product cannot be added to | W with all updates | `formed_weight` |
| whoever else reads | W + delta, which cannot be written to | `read_attribute` |

The sum is formed as late as possible (`functional.lazy`): reading a weight's dtype or shape costs
nothing and is never refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_inject.core.functional.factors import Patch
from lora_inject.core.functional.lazy import formed, lazy_weight
from lora_inject.core.functional.torch_inside import (
    in_forward,
    is_watched,
    saving_hooks,
    version_of,
)
from lora_inject.core.layers.attached import (
    GATHERED,
    Attached,
    Carrier,
    Entry,
    Still,
    check_mixed,
    held_by,
)
from lora_inject.core.layers.library import knowing
from lora_inject.core.layers.sending import sent_once
from lora_inject.core.layers.weight_kinds import PLAIN
from lora_inject.errors import AS_NATIVE, LayerError, article
from lora_inject.private import look_up


class OwnCode(threading.local):
    """The code of a layer that runs in a thread and finds its own parameters, not W + delta.

    Attributes:
        adds: The `Attached` of the layer whose forward an update is added to, or None.
        in_function: Whether that forward began inside the forward of an autograd Function.
        keeps: That of a layer whose code keeps or writes the parameters themselves.
        replaces: Whether that code may put others in their place, as `load_state_dict` does.
        nested: Whether it computes a nested batch.
    """

    adds: Attached | None = None
    in_function = False
    keeps: Attached | None = None
    replaces = False
    nested = False


OWN = OwnCode()


@contextmanager
def keeping(attached: Attached, *, replaces: bool = False) -> Iterator[None]:
    """Let the code inside find the parameters of a layer themselves."""
    before = OWN.keeps, OWN.replaces
    OWN.replaces = replaces or (OWN.replaces and OWN.keeps is attached)
    OWN.keeps = attached
    try:
        yield
    finally:
        OWN.keeps, OWN.replaces = before


# ---------------------------------------------------------------------------------------- who reads


def read_attribute(layer: Carrier, param: str) -> Any:
    """Return what the attribute of an adapted parameter reads as, by the table above.

    Raises:
        LayerError: The sum cannot be formed, or not for this reader.
    """
    raw, attached = layer._lora_raw(param), layer.__dict__.get("_lora")
    if attached is None or OWN.keeps is attached:  # without one the class is next to change
        return raw
    adds = OWN.adds is attached
    if adds and not OWN.in_function and attached.selection.may_run_again():
        raise LayerError(
            f"a forward of a {type(layer).__name__} with an adapter",
            f"it reads {param!r} inside an autograd Function, whose backward would read it again "
            "and find the update in it, which is added to the output as well",
            "Use torch.utils.checkpoint there, or read the parameter before and hand it over",
        )
    entries: Mapping[str, Entry] = attached.reads.get(param, {})
    if not adds and attached.forward and param == layer.weight_name:
        entries = {**attached.forward, **entries}
    if not entries:
        return raw
    outside = not adds and not attached.runs_here()
    if outside and not torch.compiler.is_compiling():
        for library in knowing("moves"):
            if library.is_there() and library.moves(layer, param, raw):
                return raw
    try:
        return effective_value(layer, param, raw, entries, outside=outside)
    except AttributeError as error:
        # nn.Module would answer an AttributeError with the raw weight: an inert adapter.
        raise LayerError(
            f"reading {param!r} of {type(layer).__name__}",
            f"its effective value could not be formed ({error})",
            "This is a defect of the adapter's arithmetic; please report it",
        ) from error


def effective_value(
    layer: Carrier, param: str, raw: Any, entries: Mapping[str, Entry], *, outside: bool = False
) -> Any:
    """Return W + delta, with the entries of the current selection."""
    return layer._lora.selection.current().read(layer, param, raw, entries, outside=outside)


def formed_weight(layer: Carrier) -> Any:
    """Return the weight with all updates, for a product that cannot be added to."""
    attached = layer._lora
    name = layer.weight_name
    entries = {**attached.forward, **attached.reads.get(name, {})}
    return effective_value(layer, name, layer._lora_raw(name), entries)


def check_replaced(layer: nn.Module, name: str) -> None:
    """Raise if a parameter becomes computed, as in parametrize, prune and weight_norm.

    Wrappers that gather shards or replicate replace them by plain tensors of the same value.
    """
    if not layer.__dict__.keys() & {GATHERED, "_is_replica"}:
        raise LayerError(
            f"replacing parameter {name!r} of a {type(layer).__name__}",
            "it carries an adapter, which a parametrized, pruned, quantized or fused weight "
            "would leave behind, or take in twice",
            "Eject the adapter first, then inject again; or call merge(model, eject=True). To "
            f"change its values, write into layer.get_parameter({name!r})",
        )


# ------------------------------------------------------------------------------------- what is read

# Older torch has the second only.
_is_tracing: Callable[[], bool] = (
    look_up("torch.fx._symbolic_trace.is_fx_symbolic_tracing")
    or look_up("torch.fx._symbolic_trace.is_fx_tracing")
    or bool
)


def _check_not_symbolic() -> None:
    """Raise in torch.fx.symbolic_trace, whose graph would keep today's W + delta as a constant.

    It was right until the next `activate` or training step, of which the graph knows nothing.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # loads sympy: only in a trace

    if get_proxy_mode() is None and not torch.compiler.is_compiling():  # these run what is read
        raise LayerError(
            "torch.fx.symbolic_trace of a forward that reads a weight",
            "the weight has an adapter, and the graph would hold their sum as a constant",
            "Use torch.export, or call merge(model, eject=True) first",
        )


def read_mixed(
    layer: Carrier, param: str, raw: Any, taking: list[tuple[Entry, float]], *, outside: bool
) -> Any:
    """Return W + delta, of the entries of a mix that are on a parameter."""
    if _is_tracing():
        _check_not_symbolic()
    if type(raw) not in PLAIN:
        return _other(layer, raw, taking, outside)
    # A value read under no_grad would cut the gradient of a later read in the same forward.
    key = (param, torch.is_grad_enabled(), *taking)
    cache = _read_so_far(layer._lora)
    if cache is None:
        return _effective(layer, raw, taking, outside)
    if key not in cache:
        cache[key] = _effective(layer, raw, taking, outside)
    return cache[key]


def _read_so_far(attached: Attached) -> dict[Hashable, Tensor] | None:
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


def _other(layer: Carrier, raw: Any, taking: list[tuple[Entry, float]], outside: bool) -> Any:
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
    return lazy_weight(stand_in, (), used=used)


def _effective(
    layer: Carrier, raw: Tensor, taking: list[tuple[Entry, float]], outside: bool
) -> Tensor:
    """Return `W + sum of weight * (copy - W) + sum of weight * scale * B @ A`."""
    held = held_by(layer)
    value = raw
    patches: list[Patch] = []
    gain = None
    for entry, weight in taking:
        if entry.spec is None:
            value = _trained(entry, value, raw, held[entry.mark], weight)
            continue
        gain = gain or entry.gain(held)
        patches += entry.patches(held, weight)
    if gain is not None:
        check_mixed(taking)

    def used() -> None:
        attached = layer._lora
        for entry, _ in taking:
            _is_read(layer, entry)
            # A look at a weight in a notebook is no part of what the model computes.
            if outside and entry.mark not in attached.read_from_outside and in_forward():
                # An attention of torch's reads its projection for whoever adapts the attention.
                if entry.layers and not isinstance(layer, NonDynamicallyQuantizableLinear):
                    _refuse_reading(layer, entry)
                # dynamo of torch 2.9 follows no |=
                attached.read_from_outside = attached.read_from_outside | {entry.mark}

    # From outside a trained copy is lazy, too: a loader only looks it up, others may write to it.
    if outside or len(patches) > 0:
        kept = outside and not torch.is_grad_enabled() and not in_forward()
        lazy = lazy_weight(value, patches, used=used, looks=True, kept=kept, gain=gain)
        return formed(lazy) if OWN.nested else lazy
    used()
    return value


def _is_read(layer: Carrier, entry: Entry) -> None:
    """Note that an entry takes part, and refuse dropout, which a weight cannot express."""
    if torch.compiler.is_compiling():
        return
    if entry.mark not in layer._lora.took_part:
        layer._lora.used((entry,))
    layer._lora_check_vain(entry.tensors(layer).values())
    dropout = entry.spec.dropout if entry.on_output and entry.spec else 0
    if dropout and layer._lora.selection.current().drops(layer):
        raise LayerError(
            f"reading the weight of site {entry.spec.name!r} in training",  # type: ignore[union-attr]
            f"adapter {entry.adapter!r} has dropout {dropout:g} on the layer's input, which the "
            "reader of a weight does not see",
            "Give the site dropout: 0, or call model.eval() to look at the weight",
        )


def _refuse_reading(layer: Carrier, entry: Entry) -> None:
    """Refuse that a forward reads a weight whose update a program adds where the layer is called.

    An update of zero is the same for both.
    """
    tensors = entry.tensors(layer)
    is_known = not torch.compiler.is_compiling()
    if is_known and not all(bool(tensors[role].any()) for role in "AB"):
        return
    where = entry.spec.name if entry.spec else entry.param
    raise LayerError(
        f"a forward with adapter {entry.adapter!r}, site {where!r}",
        f"another module reads the weight and does not call the layer: {entry.layers}, which made "
        "the adapter's file, computes without it, and not with W + delta",
        f"{AS_NATIVE}; or leave it out: load_adapter(leave_out=[{where!r}])",
    )


def _trained(entry: Entry, value: Tensor, raw: Tensor, copy: Tensor, weight: float) -> Tensor:
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


# ----------------------------------------------------------------- forwards that read their weights


def run_reading(layer: Carrier, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the plain forward of a layer, in which each effective weight is formed once."""
    forward = layer._lora_plain.forward
    if torch.compiler.is_compiling():
        return forward(layer, *args, **kwargs)
    # Torch attends in a nested batch by a kernel alone, which takes plain tensors.
    nested, OWN.nested = OWN.nested, any(getattr(x, "is_nested", False) for x in args)
    thread, running = threading.get_ident(), layer._lora.running
    outer, running[thread] = running.get(thread), ({}, saving_hooks())
    try:
        still = _note_buffers(layer) if layer._buffers and layer.training else {}
        outputs = forward(layer, *args, **kwargs)
        _refuse_moved(layer, still)
        return outputs
    finally:
        OWN.nested = nested
        if outer is None:
            del running[thread]
        else:
            running[thread] = outer


# A buffer that moves (statistics, a moving average) belongs to the base: an adapter neither holds
# nor restores it. No name and no dtype tells it from a constant, so each forward in training does:
# the first by its values, later ones by the tensor and its version. A save compares values again.


def _note_buffers(layer: Carrier) -> Mapping[str, Still]:
    """Note the saved buffers of a layer that trains a copy, before a forward in training."""
    attached = layer._lora
    still: dict[str, Still] = {}
    if is_watched() or not any(e.spec is None and e.scale is None for e in attached.entries()):
        return still
    for name, buffer in layer._buffers.items():
        kept = name not in layer._non_persistent_buffers_set
        if kept and type(buffer) is Tensor and not buffer.is_meta:
            noted = attached.still.get(name)
            if noted is None or noted.buffer is not buffer or noted.version != version_of(buffer):
                noted = Still(buffer, None, buffer.detach().clone())
            still[name] = noted
    attached.still = still
    return still


def _refuse_moved(layer: Carrier, still: Mapping[str, Still]) -> None:
    """Raise if a forward has moved a buffer, after all have their values again."""
    for moved, noted in still.items():
        now = layer._buffers.get(moved)
        if now is noted.buffer and noted.version == version_of(now):
            continue
        if (
            now is not None
            and now.shape == noted.values.shape
            and torch.allclose(now, noted.values, rtol=0, atol=0, equal_nan=True)
        ):
            layer._lora.still[moved] = Still(now, version_of(now), noted.values)
            continue
        with torch.no_grad():
            for name, (buffer, _, values) in still.items():
                layer._buffers[name] = buffer
                buffer.copy_(values)
        raise LayerError(
            f"training a {type(layer).__name__} in full",
            f"its forward moves its buffer {moved!r} as well: that is the base's, which an "
            "adapter neither holds nor restores",
            "Leave it out of train, or call eval() on it while the rest trains",
        )
