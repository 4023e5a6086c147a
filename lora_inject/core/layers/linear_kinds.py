"""Linear layers: `nn.Linear` and transformers' Conv1D, and quantized subclasses of them.

If the layer's forward is the stock one on a plain tensor, layer and update run as one fused step.
Otherwise the layer runs unchanged and the update is added to its output; quantized layers, and
kinds from outside that add to their output, use this second way.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_inject.core.functional import add_updates, linear
from lora_inject.core.functional.factors import cast, compute_dtype, needs_plain_operations
from lora_inject.core.functional.gain import gained
from lora_inject.core.functional.linear import frozen_output
from lora_inject.core.layers.adapted import plain_class
from lora_inject.core.layers.attached import Entry, held_by
from lora_inject.core.layers.forward_update import ForwardUpdate
from lora_inject.core.layers.plain_tensors import PLAIN
from lora_inject.core.layers.reading import trained
from lora_inject.core.layers.selection import State
from lora_inject.core.layers.weight_kinds import (
    defines_forward,
    multiplies,
    packed_weight,
    reason_against,
)
from lora_inject.core.spec.inventory import Geometry
from lora_inject.errors import LayerError
from lora_inject.rows.routed_forward import adds_bias, apart
from lora_inject.rows.routing import routing_of
from lora_inject.trials.ranges import ranged_linear

# Classes of other libraries are known by where they are defined, so that none need be imported.
CONV1D = ("transformers.pytorch_utils", "Conv1D")


class LoRALinear(ForwardUpdate):
    """Forward update of `nn.Linear`: `x W^T + b + scale * drop(x) A^T B^T` (paper, eq. 3)."""

    kind = "linear"
    transposed = False

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return whether the module is an `nn.Linear`, or a packed layer that stands for one."""
        return isinstance(module, nn.Linear) or packed_weight(type(module)) is not None

    @classmethod
    def weight_of(cls, module: nn.Module) -> str:
        """Return the name of the weight, or of what is packed in its place."""
        return packed_weight(type(module)) or cls.weight_name

    @staticmethod
    def geometry(module: Any) -> Geometry:
        """Return the widths that the layer states; packed 4-bit weights have other shapes."""
        n_in, n_out = int(module.in_features), int(module.out_features)
        return Geometry(n_in, n_out, (n_out, n_in))

    @staticmethod
    def stock(plain: type[nn.Module]) -> bool:
        """Return whether `forward` is nn.Linear's own, and the weight a parameter."""
        return plain.forward is nn.Linear.forward and not hasattr(plain, "weight")

    @classmethod
    def adds_to_output(cls, module: nn.Module) -> bool:
        """Return whether the layer is stock, or known to multiply by its weight."""
        plain = plain_class(type(module))
        return cls.stock(plain) or multiplies(plain)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer with the adapters that take part: by rows, with a gain, or as a sum.

        The arguments are those of the layer's own forward, whose first is x, `(..., in_features)`.
        A sum is one fused step where the layer is stock; else it is added to the layer's output.
        """
        if not isinstance(self, LoRALinear):  # somebody kept this method; the adapter is gone
            return type(self).forward(self, *args, **kwargs)
        attached = self._lora
        x = args[0] if len(args) == 1 and not kwargs else self._lora_input(args, kwargs)
        state = attached.selection.current()
        if state.routed:
            return self._lora_by_rows(x, state, args, kwargs)
        if x.layout is not torch.strided and self._lora_stock and not x.is_nested:  # sparse
            bias = self._lora_own("bias")
            return frozen_output(x, self._lora_formed(), bias, self.transposed, None)
        if attached.gains and (alone := attached.gained(state)) is not None:
            return self._lora_gained(alone, x, state, args, kwargs)
        compiling = torch.compiler.is_compiling()
        updates = [] if compiling else self._lora_updates(state, compiling=False)
        if updates and self._lora_stock and not x.is_nested:
            weight, bias = self._lora_weight_and_bias()
            if type(weight) in PLAIN:
                transposed, float32 = self.transposed, attached.float32
                return linear(x, weight, bias, updates, transposed=transposed, float32=float32)
            if hasattr(weight, "full_tensor") and any(u.spans for u in updates):
                return frozen_output(x, self._lora_formed(), bias, self.transposed, None)
        y = self._lora_plain_forward(args, kwargs)
        if compiling:
            updates = self._lora_compiled(y, state)
        return add_updates(y, x, updates, float32=attached.float32) if updates else y

    def _lora_plain_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the layer without its forward updates."""
        x = self._lora_input(args, kwargs)
        if self._lora_stock:  # the plain forward would read the effective weight
            weight, bias = self._lora_weight_and_bias()
            y = frozen_output(x, weight, bias, self.transposed, None)
        else:
            y = super().forward(*args, **kwargs)
        if x.requires_grad and not y.requires_grad and torch.is_grad_enabled():
            self._lora_refuse_dead()
        return y

    def _lora_refuse_dead(self) -> NoReturn:
        """Refuse to train what lies before a layer that computes without autograd."""
        weight = self._parameters.get(self.weight_of(self))
        reason = reason_against("train", self, weight)
        remedy = "Run it within torch.no_grad(), or call train_only(model, None)"
        raise LayerError(
            f"a forward of a {type(self).__name__} with gradients",
            f"with its {type(weight).__name__} it hands no gradient to its input",
            remedy if reason is None else f"{reason.remedy}. {remedy}",
        )

    def _lora_by_rows(
        self, x: Tensor, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Compute the layer with the update, and the gain, of each row's own adapter."""
        if x.is_nested:
            self._lora_refuse_nested("routed()")
        if state.packs(x):
            flat = x.flatten(0, 1)
            y = self._lora_by_rows(flat, state, (flat,), {})
            return y.reshape(*x.shape[:-1], y.shape[-1])
        reads, parts = self._lora.reads, state.parts
        added = "bias" if adds_bias(type(self), "bias") else None
        whole = any(n in parts for param, table in reads.items() if param != added for n in table)
        if whole and not state.alone:
            by_itself = functools.partial(LoRALinear.forward, self)
            found: Tensor = apart(self, by_itself, state, args, kwargs)
            return found
        fresh = self._lora_stock and type(self._lora_raw("weight")) in PLAIN and not whole
        if fresh and state.one_pass is not None and not needs_plain_operations():
            y = self._lora_by_ranges(x, state)
        else:
            routing = self._lora_routing(x, state)
            y = self._lora_plain_forward(args, kwargs)
            y = self._lora_routed(y, x, routing, state, in_place=fresh)
        biases = self._lora_biases(x, state) if added in reads else None
        y = self._lora_gained_rows(y, x, state) if self._lora.gains else y
        return y if biases is None else y + cast(biases, y.dtype)

    def _lora_biases(self, x: Tensor, state: State) -> Tensor | None:
        """Return what to add to the bias for each row `(batch, 1, ..., out)`, None for nothing."""
        routing = routing_of(self, self._lora.reads["bias"], x, state)
        if not routing.entries:
            return None
        if not torch.compiler.is_compiling():
            self._lora.used(routing.entries)
        held, raw = held_by(self), self._lora_raw("bias")
        self._lora_refuse_vain(held[e.mark] for e in routing.entries)
        each = [trained(e, raw, raw, held[e.mark], 1.0) - raw for e in routing.entries]
        found = torch.stack([torch.zeros_like(raw), *each]).index_select(0, routing.places)
        return found.view(-1, *[1] * (x.dim() - 2), found.shape[-1])

    def _lora_gained_rows(self, y: Tensor, x: Tensor, state: State) -> Tensor:
        """Multiply each row's output by the gain of its own adapter."""
        routing = self._lora_routing(x, state)
        weight, bias = self._lora_weight_and_bias()
        gains = self._lora_gains(routing, weight, y.dim())
        if gains is None:
            return y
        mine = (entry.spec for entry in routing.entries if entry.variant.gained)
        if self._lora_drops() and any(spec is not None and spec.dropout for spec in mine):
            raise LayerError(
                "routed() in training",
                f"a {type(self).__name__} has an adapter with a gain and dropout",
                "Give it dropout: 0, or train it alone",
            )
        return gained(y, y if bias is None else y - bias.to(y.dtype), gains)

    def _lora_by_ranges(self, x: Tensor, state: State) -> Tensor:
        """Compute a stock layer with the update of each trial's own tokens."""
        transposed, float32 = self.transposed, self._lora.float32
        dtype = compute_dtype(_product_dtype(x), float32)
        kept, *of = state.one_pass.of_layer(self, x, dtype)
        self._lora_refuse_vain(of[1:2])
        weight, bias = self._lora_weight_and_bias()
        return ranged_linear(x, kept, weight, bias, *of, transposed=transposed, float32=float32)

    def _lora_gained(
        self, entry: Entry, x: Tensor, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Compute the layer with the one adapter that has a gain.

        `g (W x + u) + b = (W x + b + u) + (g - 1) (W x + u)`, which is the plain output to the bit
        where g is 1 and u is 0. With dropout the second W x uses the dropped x, as in PEFT.
        """
        if x.is_nested:
            self._lora_refuse_nested("an adapter with a gain")
        float32, compiling = self._lora.float32, torch.compiler.is_compiling()
        updates = self._lora_updates(state, compiling=compiling)
        weight, bias = self._lora_weight_and_bias()
        gain = self._lora_gain(entry, weight, self._lora.chosen(state, compiling))
        p = updates[0].dropout
        if p:
            kept = F.dropout(x, p)
            updates = [u._replace(dropout=0.0) for u in updates]
            y = add_updates(self._lora_plain_forward(args, kwargs), kept, updates, float32=float32)
            base = self._lora_plain_forward((kept,), {})
            base = add_updates(base, kept, updates, float32=float32)
        elif self._lora_stock and not compiling and type(weight) in PLAIN:
            y = base = linear(x, weight, bias, updates, transposed=self.transposed, float32=float32)
        else:
            y = self._lora_plain_forward(args, kwargs)
            y = base = add_updates(y, x, updates, float32=float32)
        return gained(y, base if bias is None else base - bias.to(base.dtype), gain)

    def _lora_refuse_nested(self, asked: str) -> NoReturn:
        found = f"a {type(self).__name__} got a nested tensor"
        raise LayerError(asked, found, "Pad the batch, or run each adapter's rows by themselves")

    def _lora_weight_and_bias(self) -> tuple[Any, Any]:
        held = self._parameters
        if self._lora.reads or "weight" not in held or "bias" not in held:
            return self._lora_own(self.weight_of(self)), self._lora_own("bias")
        return held["weight"], held["bias"]


class LoRAConv1D(LoRALinear):
    """Forward update of Conv1D (`transformers/pytorch_utils.py`), with the weight `(in, out)`."""

    kind = "conv1d"
    transposed = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return whether the module's class is, or derives from, transformers' Conv1D."""
        return any((c.__module__, c.__qualname__) == CONV1D for c in type(module).__mro__)

    @staticmethod
    def geometry(module: Any) -> Geometry:
        """Return the widths, `nx` in and `nf` out."""
        n_in, n_out = int(module.nx), int(module.nf)
        return Geometry(n_in, n_out, (n_in, n_out), transposed=True)

    @staticmethod
    def stock(plain: type[nn.Module]) -> bool:
        """Return whether `forward` is Conv1D's own, and the weight a parameter."""
        return defines_forward(plain) == CONV1D and not hasattr(plain, "weight")


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a plain layer multiplies x."""
    kind = x.device.type
    lowers = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if lowers else x.dtype
