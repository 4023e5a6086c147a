"""The swapped class: a module's own class with a mixin to the left of it, made once per class.

A module that carries adapters stays the object it was and changes its class, so
everything that knew the old class still does: `isinstance`, hooks, tied tensors, quantised weights,
other references to the layer. (PyTorch's FSDP2 and parametrize work the same way.)

A module carries adapters in up to two ways. A *forward update* overrides `forward` and adds to the
output; each kind of layer has a mixin for it (`layers.linear`, `layers.embedding`). A *read* is a
property of the class with the name of a parameter: whoever reads `module.weight` gets the effective
value, while the raw parameter stays where it was in `_parameters`, under the same key. Reads serve
weights that a model reads instead of calling their layer, and the full copies that `train` and
`bias` entries make.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.errors import LayerError
from lora_inject.functional import effective_weight, lazy_weight
from lora_inject.layers.attached import Attached, Entry, saving_hooks
from lora_inject.layers.checkpointing import refuse_dead_checkpoint
from lora_inject.layers.state_dict import raise_merged

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

    A kind of layer is a subclass with `kind`, `matches` and `geometry`, and a row in
    `layers.table.KINDS`, or a call of `layers.register_kind`. One that adds to the output derives
    from `layers.linear.LoRALinear`, one whose weight is read derives from `WeightUpdate`.
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

    @staticmethod
    def adds_to_output(module: nn.Module) -> bool:  # noqa: ARG004 - for kinds that need to look
        """Return whether options of this one module let it add to its output at all."""
        return True

    @staticmethod
    def stock(plain: type[nn.Module]) -> bool:
        """Return whether a class computes exactly what its kind's own class does."""
        raise NotImplementedError

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Build the plain class: `type(layer)(...)` must not make a carrier without adapters."""
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
        if self._lora.selection.merged is not None:
            raise_merged()
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

    def _lora_takes_part(self, param: str | None, tensors: Iterable[Tensor]) -> None:
        """Note for `unreached` that adapters take part, and refuse to train them in vain."""
        if self._lora.selection.witness is not None:
            self._lora.selection.witness.add((id(self), param))
        if not self.training or torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled():
            if "_hf_hook" in self.__dict__:
                refuse_offloaded(self)
        elif any(t.requires_grad for t in tensors):
            refuse_dead_checkpoint()

    def _lora_read(self, param: str) -> Any:
        """Return the effective value of a parameter under the current selection."""
        raw = self._parameters[param]
        attached = self._lora
        entries = attached.reads.get(param)
        if raw is None or entries is None or _is_sharded(raw):
            return raw
        state = attached.selection.current()
        taking = [(entries[name], weight) for name, weight in state.active if name in entries]
        if not taking:
            return raw
        self._lora_takes_part(
            param, (e.tensor(self, "T" if e.spec is None else "A") for e, _ in taking)
        )
        # A value read under no_grad would cut the gradient of a later read in the same forward.
        key, cache = (param, torch.is_grad_enabled()), attached.reads_so_far()
        if cache is None:
            return self._lora_effective(raw, taking, effective_weight)
        if key not in cache:
            cache[key] = self._lora_effective(raw, taking, lazy_weight)
        return cache[key]

    def _lora_effective(
        self, raw: Tensor, taking: list[tuple[Entry, float]], form: Callable[..., Tensor]
    ) -> Tensor:
        """Return `W + sum of weight * (copy - W) + sum of weight * scale * B @ A`."""
        value = raw
        low_rank, float32 = [], False
        for entry, weight in taking:
            spec = entry.spec
            if spec is None:
                value = _replaced(value, raw, entry.tensor(self, "T"), weight)
                continue
            float32 = float32 or spec.compute == "float32"
            for A, B, sign in entry.pairs(self):
                low_rank.append((spec, A, B, spec.scale * weight * sign))
        return form(value, low_rank, float32=float32) if low_rank else value


def _replaced(value: Tensor, raw: Tensor, copy: Tensor, weight: float) -> Tensor:
    """Return `value + weight * (copy - raw)`, or the copy itself where that is all there is."""
    if weight == 1.0 and value is raw:
        return copy.to(raw.dtype)
    return (value.to(copy.dtype) + weight * (copy - raw.to(copy.dtype))).to(raw.dtype)


def _is_sharded(raw: Tensor) -> bool:
    """Whether FSDP2 holds the tensor: whoever reads it then wants to shard it, not to use it."""
    return type(raw).__name__ == "DTensor"


class WeightUpdate(Adapted):
    """A module whose parameters are read: the mixin for reads without a forward update."""

    kind = "reader"


def _cached_forward(plain: type[nn.Module]) -> Callable[..., Any]:
    """Return the plain forward, during which each effective weight is formed once."""

    @functools.wraps(plain.forward)
    def forward(self: Adapted, *args: Any, **kwargs: Any) -> Any:
        attached = self._lora
        if torch.compiler.is_compiling():
            return plain.forward(self, *args, **kwargs)
        outer, attached.cache, attached.hooks = (attached.cache, attached.hooks), {}, saving_hooks()
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            attached.cache, attached.hooks = outer

    return forward


def _property(param: str) -> property:
    def read(self: Adapted) -> Any:
        try:
            return self._lora_read(param)
        except AttributeError as error:
            # nn.Module would answer an AttributeError with the raw weight: an inert adapter.
            raise LayerError(
                f"reading {param!r} of {type(self).__name__}",
                f"its effective value could not be formed ({error})",
                "This is a defect of the adapter's arithmetic; please report it",
            ) from error

    return property(read)


_CLASSES: dict[tuple[type, type, frozenset[str]], type[Adapted]] = {}


def adapted_class(
    plain: type[nn.Module], mixin: type[Adapted], reads: Iterable[str]
) -> type[Adapted]:
    """Return the swapped class of a plain class: one per class, or torch.compile guards fail.

    Args:
        plain: The module's own class.
        mixin: The kind of layer, or `WeightUpdate`.
        reads: Parameters whose effective value is read.

    Returns:
        A subclass of both, with the plain class's name.
    """
    key = (plain, mixin, frozenset(reads))
    if key not in _CLASSES:
        namespace: dict[str, Any] = {name: _property(name) for name in sorted(key[2])}
        namespace |= {
            "_lora_plain": plain,
            "_lora_mixin": mixin,
            "_lora_reads": key[2],
            "_lora_stock": mixin is not WeightUpdate and mixin.stock(plain),
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
        }
        if mixin is WeightUpdate:
            namespace["forward"] = _cached_forward(plain)
        _CLASSES[key] = types.new_class(
            plain.__name__, (mixin, plain), exec_body=lambda ns: ns.update(namespace)
        )
    return _CLASSES[key]


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
    key = ("plain", cls)
    if key not in _PLAIN:
        bases = tuple(plain_class(b) for b in cls.__bases__)
        namespace = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
        _PLAIN[key] = type(cls.__name__, bases, namespace)
    return _PLAIN[key]


_PLAIN: dict[tuple[str, type], type] = {}
