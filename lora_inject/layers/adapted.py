"""The swapped class: a module's own class with a mixin to the left of it, made once per class.

A module that carries adapters stays the object it was and changes its class, so
everything that knew the old class still does: `isinstance`, hooks, tied tensors, quantized weights,
other references to the layer. (PyTorch's FSDP2 and parametrize work the same way.)

A module carries adapters in up to two ways. A *forward update* overrides `forward` and adds to the
output. A *weight update* is a property of the class with the name of a parameter: a forward that
reads `module.weight` gets the effective value, while the raw parameter stays where it was in
`_parameters`, under the same key, and is what everybody else reads and writes (`layers.reading`).
The weight of a layer with a forward update is such a property, too, for a parent that reads it.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from lora_inject.errors import LayerError
from lora_inject.functional import lazy_weight, needs_plain_operations
from lora_inject.layers import recurrent
from lora_inject.layers.attached import (
    Attached,
    Entry,
    attached_to,
    held_by,
    refuse_mixed,
    saving_hooks,
)
from lora_inject.layers.checkpointing import refuse_dead_checkpoint
from lora_inject.layers.reading import computes, running_module
from lora_inject.layers.routed_forward import adds_rows, with_rows
from lora_inject.layers.selection import State
from lora_inject.layers.state_dict import refuse_loading

# Key of the scales in a state dict's metadata.
SCALES = "lora_scales"


class Geometry(NamedTuple):
    """Shapes of a layer's weight matrix, stated by the layer and never read off packed weights.

    Attributes:
        in_features: Width of the input of A.
        out_features: Width of the output of B.
        weight_shape: Shape of the weight as the layer states it.
        transposed: Whether the weight matrix is `(in, out)`.
        experts: Length of a leading dimension of stacked matrices, or None.
    """

    in_features: int
    out_features: int
    weight_shape: tuple[int, ...]
    transposed: bool = False
    experts: int | None = None


def refuse_offloaded(module: nn.Module) -> None:
    """Raise where accelerate offloads a module: its hook trains copies and throws them away.

    Raises:
        LayerError: The module's hook offloads.
    """
    hook = module.__dict__.get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))  # accelerate.hooks.SequentialHook, or one hook
    if any(getattr(h, "offload", False) for h in hooks):
        raise LayerError(
            f"training an adapter on a {type(module).__name__} that accelerate offloads",
            "its hook hands the forward copies of all parameters, whose gradients are lost",
            "Train without offload; for inference call model.eval()",
        )


class Adapted(nn.Module):
    """Mixin of every swapped class: copies, pickles, casts and loads like the class it stands on.

    A kind of layer is a subclass with `kind`, `matches` and `geometry`, and a call of
    `layers.register_kind`. One that adds to the output derives from `layers.LoRALinear`, one whose
    weight is read derives from `WeightUpdate`.
    """

    kind: ClassVar[str] = ""
    # Name of the layer's weight among its parameters.
    weight_name: ClassVar[str] = "weight"
    # Set on each swapped class by `adapted_class`.
    _lora_plain: ClassVar[type[nn.Module]]
    _lora_mixin: ClassVar[type[Adapted]]
    _lora_reads: ClassVar[frozenset[str]]
    _lora_stock: ClassVar[bool]
    # Set on each module by `swap`.
    _lora: Attached

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return whether this kind of layer is meant for `module`."""
        raise NotImplementedError

    @staticmethod
    def geometry(module: nn.Module) -> Geometry:
        """Return the shapes of the layer's weight."""
        raise NotImplementedError

    @classmethod
    def weight_of(cls, module: nn.Module) -> str:  # noqa: ARG003 - for kinds that pack it
        """Return the name of the tensor, parameter or buffer, that stands for the weight."""
        return cls.weight_name

    @classmethod
    def adds_to_output(cls, module: nn.Module) -> bool:
        """Return whether `f(x; W + D) = f(x; W) + D x` is known of a module for any D.

        Else its weight reads as W + delta, which is right for whatever it computes.
        """
        return cls.stock(plain_class(type(module)))

    @staticmethod
    def stock(plain: type[nn.Module]) -> bool:  # noqa: ARG004 - for kinds that have one
        """Return whether a class computes exactly what its kind's own torch class does."""
        return False

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Build the plain class: `type(layer)(...)` must not make a carrier without adapters."""
        if "_lora_plain" not in cls.__dict__ and not args and not kwargs:
            return object.__new__(cls)  # a copy of a class on top of ours (torch's parametrize)
        return cls._lora_plain(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the plain class, from which the swapped one is made again."""
        mixin = self._lora_mixin
        found = super().__reduce_ex__(2)
        state = found[2] if isinstance(found, tuple) and len(found) > 2 else self.__dict__
        return _rebuild, (self._lora_plain, mixin, tuple(sorted(self._lora_reads))), state

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move or cast like nn.Module, but never narrow an adapter's float32 masters."""
        masters = {
            id(t)
            for entry in self._lora.entries()
            for name in entry.names.values()
            if (p := self._parameters[name]) is not None
            for t in (p, p.grad)
        }

        def keep_wide(t: Tensor) -> Tensor:
            out: Tensor = fn(t)
            if out.dtype == t.dtype or id(t) not in masters:
                return out
            return t.to(out.device, torch.promote_types(out.dtype, torch.float32))

        super()._apply(keep_wide, recurse)  # type: ignore[no-untyped-call]
        for entry in self._lora.entries():
            for role in entry.names:
                self._lora.selection.extend_to(entry.tensor(self, role).device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save like nn.Module, and note every scale, which the tensors do not tell."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        noted = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if noted is not None:
            noted[SCALES] = self._lora_scales()

    def _lora_scales(self) -> dict[str, float]:
        return {entry.names["A"]: entry.spec.scale for entry in self._lora.entries() if entry.spec}

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Let a plain base checkpoint load strictly; half an adapter is still missing keys."""
        refuse_loading(self)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        noted = local_metadata.get(SCALES, {})
        for name, scale in self._lora_scales().items():
            if prefix + name in state_dict and noted.get(name, scale) != scale:
                error_msgs.append(
                    f"{prefix}{name}: its adapter has scale {noted[name]:g} in the state dict and "
                    f"{scale:g} here. Inject with the same alpha and rank, or use load_adapter"
                )
        by_adapter: dict[str, list[str]] = {}
        for entry in self._lora.entries():
            by_adapter.setdefault(entry.adapter, []).extend(
                prefix + n for n in entry.names.values()
            )
        loading = self._lora.selection.loading(missing_keys)
        for adapter, keys in by_adapter.items():
            if any(key in state_dict for key in keys):
                loading.present(adapter)
            else:
                loading.absent(adapter, keys)

    def extra_repr(self) -> str:
        """Return the plain layer's description and the adapters on it."""
        notes = [f"{e.adapter}: r={e.spec.rank}" for e in self._lora.entries() if e.spec]
        plain = super().extra_repr()
        return f"{plain}, lora={{{', '.join(notes)}}}" if notes else plain

    def __delattr__(self, name: str) -> None:
        """Delete like nn.Module, but not what carries an adapter."""
        if name in self._parameters and any(e.param == name for e in self._lora.entries()):
            self._lora_refuse_replaced(name)
        super().__delattr__(name)

    def _lora_refuse_replaced(self, name: str) -> None:
        """Raise where a parameter is to be computed, as parametrize, prune and weight_norm do.

        FSDP1 and DataParallel put plain tensors in the place of parameters, too, of the same value.
        """
        if not self.__dict__.keys() & {"_is_fsdp_managed_module", "_is_replica"}:
            raise LayerError(
                f"replacing parameter {name!r} of a {type(self).__name__}",
                "it carries an adapter, which a parametrized, pruned or normalized weight would "
                "leave behind",
                "Eject the adapter first, then inject again",
            )

    def _replicate_for_data_parallel(self) -> Any:
        """Make the replica that torch's DataParallel fills, of the swapped class."""
        replica: Any = object.__new__(type(self))
        replica.__dict__ = {**self.__dict__, "_parameters": {}, "_is_replica": True}
        replica._buffers, replica._modules = self._buffers.copy(), self._modules.copy()
        if (flat := self.__dict__.get("_flat_weights")) is not None:  # replicas write theirs
            replica.__dict__["_flat_weights"] = flat[:]
        return replica

    def __prepare_scriptable__(self) -> Any:
        """Raise, before torch.jit.script has changed anything.

        Raises:
            LayerError: Always.
        """
        raise LayerError(
            f"torch.jit.script of a {type(self).__name__}",
            "it carries an adapter, which a script cannot",
            "Call merge(model, eject=True) first, or use torch.jit.trace or torch.export",
        )

    def _lora_refuse_vain(self, tensors: Iterable[Tensor]) -> None:
        """Raise where adapters take part and are to train, and no gradient would reach them."""
        if not self.training or torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled():
            if "_hf_hook" in self.__dict__:
                refuse_offloaded(self)
        elif any(t.requires_grad for t in tensors):
            refuse_dead_checkpoint()

    def _lora_raw(self, param: str) -> Any:
        """Return what the plain class would: a parameter, or a tensor that stands in its place."""
        computed = getattr(self._lora_plain, param, None)
        if isinstance(computed, property):
            return computed.__get__(self)
        if param in self._parameters:
            return self._parameters[param]
        if param in self.__dict__:
            return self.__dict__[param]
        return super().__getattr__(param)  # raises

    def _lora_read(self, param: str, raw: Any) -> Any:
        """Return the effective value of a parameter to a forward, and the raw one else."""
        reader = running_module()
        if reader is None:
            return raw
        attached = self._lora
        entries = attached.reads.get(param, {})
        if attached.forward and reader is not self and param == self.weight_name:
            entries = {**attached.forward, **entries}
        by_rows = reader is self and adds_rows(self._lora_plain, param)
        if by_rows and attached.selection.current().routed:
            return raw
        outside = reader is not self and not attached.running and isinstance(reader, nn.Module)
        return self._lora_value(param, raw, entries, outside=outside)

    def _lora_value(
        self, param: str, raw: Any, entries: Mapping[str, Entry], *, outside: bool = False
    ) -> Any:
        """Return W + delta of those of the entries that take part under the current selection."""
        if not entries:
            return raw
        if raw is None:
            self._lora_refuse_replaced(param)
        attached = self._lora
        state = attached.selection.current()
        if state.routed:
            return self._lora_refuse_routed(param, raw, entries, state)
        taking = [(entries[name], weight) for name, weight in state.active if name in entries]
        if not taking:
            return raw
        if type(raw) not in PLAIN:
            return self._lora_other(raw, taking, outside)
        # A value read under no_grad would cut the gradient of a later read in the same forward.
        key, cache = (param, torch.is_grad_enabled()), attached.reads_so_far()
        if cache is None:
            return self._lora_effective(raw, taking, outside)
        if key not in cache:
            cache[key] = self._lora_effective(raw, taking, outside)
        return cache[key]

    def _lora_other(self, raw: Any, taking: list[tuple[Entry, float]], outside: bool) -> Any:
        """Return what a sharded weight, or a quantized one, reads as.

        Tensor parallelism computes with shards; FSDP2 reads them in hooks, to gather them. What
        replaced a weight after inject, or is read by a parent, has no W to add to: its shape and
        dtype may be asked for.
        """
        if torch.compiler.is_compiling():
            return raw
        if hasattr(raw, "full_tensor"):
            return self._lora_effective(raw, taking, outside) if computes() else raw
        entry = taking[0][0]
        if self._lora.forward.get(entry.adapter) is entry and not outside:
            return raw  # the layer's own forward, to whose output the update is added

        def used() -> None:
            raise LayerError(
                f"reading {entry.param!r} of a {type(self).__name__} in a forward",
                f"it is a {type(raw).__name__}, to which adapter {entry.adapter!r} cannot be added",
                "Leave this layer out of the adapter, or quantize it before inject",
            )

        stand_in = torch.empty((), dtype=raw.dtype, device=raw.device).expand(raw.shape)
        return lazy_weight(stand_in, (), float32=False, used=used)

    def _lora_effective(
        self, raw: Tensor, taking: list[tuple[Entry, float]], outside: bool
    ) -> Tensor:
        """Return `W + sum of weight * (copy - W) + sum of weight * scale * B @ A`."""
        held, value = held_by(self), raw
        low_rank, float32, gain = [], False, None
        for entry, weight in taking:
            spec = entry.spec
            if spec is None:
                value = _trained(entry, value, raw, held[entry.mark], weight)
                continue
            # The weight of a layer keeps its dtype, which the layer's input has.
            float32 = float32 or (spec.compute == "float32" and spec.kind == "parameter")
            gain = gain or entry.gain(held)
            for A, B, sign in entry.pairs(held):
                low_rank.append((spec, A, B, spec.scale * weight * sign))
        if gain is not None:
            refuse_mixed(taking)

        def used() -> None:
            for entry, _ in taking:
                self._lora_is_read(entry)
                if outside and entry.mark not in self._lora.read_from_outside:
                    self._lora.read_from_outside |= {entry.mark}

        if low_rank:
            return lazy_weight(value, low_rank, float32=float32, used=used, gain=gain)
        used()
        return value

    def _lora_is_read(self, entry: Entry) -> None:
        """Note that an entry takes part, and refuse what a weight cannot express."""
        if torch.compiler.is_compiling():
            return
        if entry.mark not in self._lora.took_part:
            self._lora.used((entry,))
        self._lora_refuse_vain((held_by(self)[entry.mark],))
        forward = self._lora.forward.get(entry.adapter) is entry
        if forward and self.training and entry.spec and entry.spec.dropout:
            raise LayerError(
                f"reading the weight of site {entry.spec.name!r} in a forward",
                f"adapter {entry.adapter!r} has dropout {entry.spec.dropout:g} on the layer's "
                "input, which the reader of a weight does not see",
                "Give the site dropout: 0",
            )

    def _lora_refuse_routed(
        self, param: str, raw: Tensor, entries: Mapping[str, Entry], state: State
    ) -> Tensor:
        """Return W for a question about its shape or dtype; raise where it is used."""
        if not state.names & entries.keys():
            return raw

        def used() -> None:
            raise LayerError(
                f"routed(), reading {param!r} of a {type(self).__name__} in a forward",
                "one weight is read for the whole batch, and its rows have adapters of their own",
                "Leave this layer out of adapters that are routed",
            )

        return lazy_weight(raw, (), float32=False, used=used)


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is packed, so that its values are not those of its elements."""
    plain = weight.is_floating_point() and weight.element_size() >= 2
    return not plain or type(weight) not in PLAIN


# What W + delta can be formed of: neither packed nor sharded, and what stands for it in a trace.
PLAIN = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)


def _trained(entry: Entry, value: Tensor, raw: Tensor, copy: Tensor, weight: float) -> Tensor:
    """Return a tensor with what an entry without a site makes of it: added, or put in its place."""
    if entry.scale is not None:
        return (value.to(copy.dtype) + weight * entry.scale * copy).to(raw.dtype)
    if entry.rows is None:
        return _replaced(value, raw, copy, weight)
    index = _index(entry.rows, raw)
    if weight == 1.0 and value is raw:
        return value.index_copy(0, index, copy.to(raw.dtype))
    rows = value[index].to(copy.dtype) + weight * (copy - raw[index].to(copy.dtype))
    return value.index_copy(0, index, rows.to(raw.dtype))


@functools.lru_cache(maxsize=64)
def _kept_index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a backward may need it, whoever asks first
        return torch.tensor(rows, device=device)


def _index(rows: tuple[int, ...], like: Tensor) -> Tensor:
    """Return numbers of rows as a tensor, which on a device would be a transfer in each forward."""
    if type(like) in (nn.Parameter, Tensor) and not needs_plain_operations():
        return _kept_index(rows, like.device)
    return torch.tensor(rows, device=like.device)


def _replaced(value: Tensor, raw: Tensor, copy: Tensor, weight: float) -> Tensor:
    """Return `value + weight * (copy - raw)`, or the copy itself where that is all there is."""
    if weight == 1.0 and value is raw:
        return copy.to(raw.dtype)
    return (value.to(copy.dtype) + weight * (copy - raw.to(copy.dtype))).to(raw.dtype)


class WeightUpdate(Adapted):
    """A module whose parameters are read: the mixin for reads without a forward update."""

    kind = "reader"


def _cached_forward(plain: type[nn.Module]) -> Callable[..., Any]:
    """Return the plain forward, during which each effective weight is formed once."""

    @functools.wraps(plain.forward)
    def forward(self: Adapted, *args: Any, **kwargs: Any) -> Any:
        attached = attached_to(self)
        # Without: somebody has kept this method, and the adapter was ejected.
        if attached is None or torch.compiler.is_compiling():
            return plain.forward(self, *args, **kwargs)
        thread, running = threading.get_ident(), attached.running
        outer, running[thread] = running.get(thread), ({}, saving_hooks())
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            if outer is None:
                del running[thread]
            else:
                running[thread] = outer

    return forward


def _property(param: str) -> property:
    def read(self: Adapted) -> Any:
        raw = self._lora_raw(param)
        try:
            return self._lora_read(param, raw)
        except AttributeError as error:
            # nn.Module would answer an AttributeError with the raw weight: an inert adapter.
            raise LayerError(
                f"reading {param!r} of {type(self).__name__}",
                f"its effective value could not be formed ({error})",
                "This is a defect of the adapter's arithmetic; please report it",
            ) from error

    def write(self: Adapted, value: Any) -> None:
        # nn.Module.__setattr__ has put Parameters into `_parameters` and does not come here.
        self._lora_refuse_replaced(param)
        self.__dict__[param] = value

    def delete(self: Adapted) -> None:
        del self.__dict__[param]

    return property(read, write, delete)


# Both hold a class while a module has it, and let it go with the last one.
_CLASSES: WeakValueDictionary[Any, type[Adapted]] = WeakValueDictionary()
_PLAIN: WeakValueDictionary[Any, type] = WeakValueDictionary()


def adapted_class(
    plain: type[nn.Module], mixin: type[Adapted], reads: Iterable[str]
) -> type[Adapted]:
    """Return the swapped class of a plain class: one per class, or torch.compile guards fail.

    Args:
        plain: The module's own class.
        mixin: The kind of layer, or `WeightUpdate`.
        reads: Parameters whose effective value is read, beside the weight of a stock layer.

    Returns:
        A subclass of both, with the plain class's name.
    """
    stock = mixin.stock(plain)
    key = (plain, mixin, frozenset({*reads, mixin.weight_name} if stock else reads))
    found = _CLASSES.get(key)
    if found is None:
        namespace: dict[str, Any] = {name: _property(name) for name in sorted(key[2])}
        namespace |= {
            "_lora_plain": plain,
            "_lora_mixin": mixin,
            "_lora_reads": key[2],
            "_lora_stock": stock,
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
            **(recurrent.MEMBERS if issubclass(plain, nn.RNNBase) else {}),
        }
        if mixin is WeightUpdate:
            namespace["forward"] = with_rows(plain, _cached_forward(plain))
        found = types.new_class(
            plain.__name__, (mixin, plain), exec_body=lambda ns: ns.update(namespace)
        )
        if _layout(plain) is not _layout(mixin):
            found = _in_layout_of(plain, found, namespace)
        _CLASSES[key] = found
    return found


def _layout(cls: type) -> type:
    """Return the class that the memory layout of a class begins with; usually nn.Module."""
    while (base := cls.__base__) is not object and base is not None:
        cls = base
    return cls


def _in_layout_of(plain: type, wanted: type[Adapted], namespace: dict[str, Any]) -> type[Adapted]:
    """Return a class like `wanted` that instances of `plain` can change to.

    Python lets an object change its class only where both derive first from the same layout. Where
    a mixin stands before nn.Module (optimum-quanto's QLinear) ours has to come second among the
    bases, and first in the order in which methods are looked up.
    """
    meta: Any = type("Reordered", (type(plain),), {"mro": lambda cls: [cls, *wanted.__mro__[1:]]})
    bases = wanted.__bases__[::-1]
    found: type[Adapted] = types.new_class(
        plain.__name__, bases, {"metaclass": meta}, lambda ns: ns.update(namespace)
    )
    return found


def _rebuild(plain: type[nn.Module], mixin: type[Adapted], reads: tuple[str, ...]) -> Adapted:
    """Make an empty carrier, for pickle and deepcopy, which then restore its state."""
    made: Adapted = object.__new__(adapted_class(plain, mixin, reads))
    return made


def plain_class(cls: type) -> type:
    """Return a class without our mixin: what the module is to everybody else."""
    if "_lora_plain" in cls.__dict__:
        plain: type = cls.__dict__["_lora_plain"]
        return plain
    if not issubclass(cls, Adapted):
        return cls
    # Somebody (FSDP2) has swapped the class again on top of ours: the same class on plain bases.
    found = _PLAIN.get(cls)
    if found is None:
        bases = tuple(plain_class(b) for b in cls.__bases__)
        namespace = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
        found = _PLAIN[cls] = type(cls.__name__, bases, namespace)
    return found
