"""The kinds of layers, each a class in the table `KINDS`.

A kind says which classes of layers it is for (`matches`), how their weight is a matrix
(`geometry`), whether an update may be added to the output (`adds_to_output`), and if so how a layer
is computed with a sum of updates:

| method | is |
|---|---|
| `_lora_with_updates` | the output with a sum of updates, and a gain as the last step |
| `_lora_without_updates` | the output of the plain layer |

Every other layer reads its weight as W + delta (`WeightUpdate`), which is right whatever it
computes with it. Raw parameters need no kind: the parameter itself is the site.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_inject.core.functional.factors import Update
from lora_inject.core.functional.gain import Gains, gained, gains_of
from lora_inject.core.functional.linear import frozen_output, gained_linear, linear
from lora_inject.core.functional.plain_operations import add_updates, embedding
from lora_inject.core.functional.torch_inside import differentiates_forward
from lora_inject.core.layers.adapted import (
    Adapted,
    WeightUpdate,
    plain_class,
)
from lora_inject.core.layers.attached import (
    Recipe,
    check_mixed,
    factors_of,
    held_by,
)
from lora_inject.core.layers.library import (
    dense,
    loaded_kinds,
    multiplies,
    packed_weight,
    reason_against,
    weight_kind,
)
from lora_inject.core.layers.reading import OWN, effective_value, formed_weight
from lora_inject.core.layers.selection import Selected
from lora_inject.core.layers.weight_kinds import (
    PLAIN,
    UNKNOWN,
    defines_forward,
    derives_from,
    is_quantized,
)
from lora_inject.core.spec.sites import Geometry
from lora_inject.errors import LayerError, article


class ForwardUpdate(Adapted):
    """Mixin of the kinds that add to their output."""

    # With args and kwargs of a call; a sum of updates, and a gain `(out,)` that is a last step.
    _lora_with_updates: ClassVar[Callable[..., Any]]
    _lora_without_updates: ClassVar[Callable[..., Any]]

    def _lora_mixed(self, mix: Selected, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the layer with the adapters of a mix."""
        compiling = torch.compiler.is_compiling()
        if compiling:
            recipes = self._lora.recipes(mix)
        else:
            last, recipes = self._lora.last_chosen
            if last is not mix:
                recipes = self._lora_choose(mix)
        if not recipes:
            return self._lora_without_updates(args, kwargs)
        updates = factors_of(recipes, held_by(self), training=self.training)
        if self.training and not compiling:
            self._lora_check_vain(t for u in updates for t in (u.A, u.B))
        gains = gains_in_forward(self, mix, recipes) if self._lora.gains else None
        return self._lora_with_updates(args, kwargs, updates, gains)

    def _lora_choose(self, mix: Selected) -> tuple[Recipe, ...]:
        """Look up what takes part under a mix."""
        if self._lora_stock and not self.stock(self._lora_plain):
            name = type(self).__name__
            raise LayerError(
                f"a forward of a {name} with an adapter",
                f"since inject somebody has put another forward onto {name}, which would not be "
                "called",
                "Eject, then inject again",
            )
        return self._lora.choose(mix)

    def _lora_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the first argument of a call, as the layer's own forward would name it."""
        if len(args) == 1 and not kwargs:
            x: Tensor = args[0]
            return x
        bound = inspect.signature(self._lora_plain.forward).bind(self, *args, **kwargs)
        first: Tensor = list(bound.arguments.values())[1]
        return first

    def _lora_own(self, param: str) -> Any:
        """Return a parameter as this layer's own forward uses it: with its weight updates only."""
        if param not in self._lora_reads:
            return getattr(self, param)
        raw = self._lora_raw(param)
        reads = self._lora.reads.get(param)
        return effective_value(self, param, raw, reads) if reads else raw


# --------------------------------------------------------------------------- a gain of the outputs


def gains_in_forward(
    layer: ForwardUpdate, mix: Selected, recipes: Iterable[Recipe]
) -> Gains | None:
    """Return the gains of a layer's outputs under a mix, with a gradient to the magnitude.

    None where no adapter has one; who has one is alone.
    """
    attached = layer._lora
    taking = mix.among(attached.forward)
    entry = next((entry for entry, _ in taking if entry.gained), None)
    if entry is None or entry.spec is None:
        return None
    check_mixed([*taking, *mix.among(attached.reads.get(entry.param, {}))])
    of_kind = layer.weight_name if layer._lora_stock else layer.weight_of(type(layer))
    weight = layer._lora_own(of_kind)
    if is_quantized(weight) and weight_kind(layer, weight) is not UNKNOWN:
        weight = dense(layer, weight)
    elif type(weight) not in PLAIN:
        raise LayerError(
            f"a forward of site {entry.spec.name!r}",
            f"its gain needs the norms of W, which is {article(type(weight).__name__)} here",
            "Shard with fully_shard, or train this layer with variant: lora",
        )
    gain = entry.gain(held_by(layer))
    assert gain is not None
    updates = factors_of(recipes, held_by(layer), training=False)
    return gains_of(weight, updates, gain, layer.geometry(layer).transposed)


# ------------------------------------------------------------------------------------ linear layers


class LoRALinear(ForwardUpdate):
    """Forward update of `nn.Linear`: `x W^T + b + scale * drop(x) A^T B^T` (paper, eq. 3).

    If the layer's forward is the stock one on a plain tensor, layer and update run as one fused
    step. Otherwise the layer runs unchanged and the update is added to its output; quantized
    layers, packed layers that are no `nn.Linear`, and kinds from outside use this second way.
    """

    kind = "linear"
    transposed = False  # whether the weight is stored (in, out)

    @classmethod
    def matches(cls, layer: type[nn.Module]) -> bool:
        """Return whether a class is an `nn.Linear`, or a packed layer that stands for one."""
        return issubclass(layer, nn.Linear) or packed_weight(layer) is not None

    @classmethod
    def weight_of(cls, layer: type[nn.Module]) -> str:
        """Return the name of the weight, or of what is packed in its place."""
        return packed_weight(layer) or cls.weight_name

    @staticmethod
    def geometry(module: Any) -> Geometry:
        """Return the widths that the layer states; packed 4-bit weights have other shapes."""
        n_in, n_out = int(module.in_features), int(module.out_features)
        return Geometry(n_in, n_out, (n_out, n_in))

    @staticmethod
    def stock(plain: type[nn.Module]) -> bool:
        """Return whether `forward` is nn.Linear's own, and the weight a parameter."""
        return _is_torchs(plain, nn.Linear)

    @classmethod
    def adds_to_output(cls, module: nn.Module, *, stock: bool) -> bool:
        """Return whether the layer is stock, or known to multiply by its weight.

        The projection of torch's attention is never called: the attention reads its weight.
        """
        is_called = not isinstance(module, NonDynamicallyQuantizableLinear)
        return is_called and (stock or multiplies(plain_class(type(module))))

    def _lora_with_updates(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        updates: Sequence[Update],
        gains: Gains | None = None,
    ) -> Any:
        """Compute the layer with a sum of updates.

        1. Where the layer is stock and its weight plain, both are one fused step.
        2. A DTensor can be added to as a whole, and to no part of it: for slices the layer
           multiplies with W + delta.
        3. Else the layer runs unchanged, and the sum is added to its output.
        """
        if gains is not None:
            return self._lora_gained(args, kwargs, updates, gains)
        x = args[0] if len(args) == 1 and not kwargs else self._lora_input(args, kwargs)
        float32 = self._lora.float32
        if self._lora_stock and not x.is_nested:
            weight, bias = self._lora_weight_and_bias()
            if type(weight) in PLAIN:
                transposed = self.transposed
                return linear(x, weight, bias, updates, transposed=transposed, float32=float32)
            if hasattr(weight, "full_tensor") and any(update.spans for update in updates):
                return frozen_output(x, formed_weight(self), bias, self.transposed)
        y = self._lora_without_updates(args, kwargs)
        return add_updates(y, x, updates, float32=float32)

    def _lora_gained(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        updates: Sequence[Update],
        gains: Gains,
    ) -> Any:
        """Compute the layer with a sum of updates u and a gain g: `g (W x + u) + b`."""
        x = self._lora_input(args, kwargs)
        if x.is_nested:
            asked, problem = (
                "an adapter with a gain",
                f"a {type(self).__name__} got a nested tensor",
            )
            raise LayerError(asked, problem, "Pad the batch")
        if updates[0].dropout:
            kept = F.dropout(x, updates[0].dropout)
            updates = [update._replace(dropout=0.0) for update in updates]
            return self._lora_dropped(args, kwargs, kept, updates, gains)
        if (stock := self._lora_plain_matrix()) is not None:
            weight, bias = stock
            how = {"transposed": self.transposed, "float32": self._lora.float32}
            return gained_linear(x, weight, bias, updates, gains, **how)
        y = self._lora_with_updates(args, kwargs, updates)
        return gained(y, gains.of_outputs, self._lora_own("bias"))

    def _lora_dropped(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kept: Tensor,
        updates: Sequence[Update],
        gains: Gains | None,
    ) -> Tensor:
        """Compute the layer where the input of the updates is what dropout has left of its own.

        With a gain it is `W x + b + u + (g - 1) (W x' + u)`, where x' is what dropout has left: the
        plain output to the bit where g is 1 and u is 0.
        """
        plain = self._lora_without_updates(args, kwargs)
        y = add_updates(plain, kept, updates, float32=self._lora.float32)
        if gains is None:
            return y
        more = gains._replace(of_outputs=gains.of_outputs - 1)
        if (stock := self._lora_plain_matrix()) is not None:
            how = {"transposed": self.transposed, "float32": self._lora.float32}
            return y + gained_linear(kept, stock[0], None, updates, more, **how)
        base, bias = self._lora_with_updates((kept,), {}, updates), self._lora_own("bias")
        base = base if bias is None else base - bias.to(base.dtype)
        return torch.addcmul(y, base, more.of_outputs.to(y.dtype))

    def _lora_plain_matrix(self) -> tuple[Tensor, Tensor | None] | None:
        """Return weight and bias of a stock layer over a plain tensor; None for every other."""
        if not self._lora_stock:
            return None
        weight, bias = self._lora_weight_and_bias()
        return (weight, bias) if type(weight) in PLAIN else None

    def _lora_without_updates(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the layer without its forward updates."""
        x = self._lora_input(args, kwargs)
        if self._lora_stock:  # the plain forward would read the effective weight
            weight, bias = self._lora_weight_and_bias()
            y = frozen_output(x, weight, bias, self.transposed)
        else:
            before, OWN.adds = OWN.adds, self._lora
            around, compiling = OWN.in_function, torch.compiler.is_compiling()
            OWN.in_function = not (compiling or differentiates_forward())
            try:
                y = self._lora_plain.forward(self, *args, **kwargs)
            finally:
                OWN.adds, OWN.in_function = before, around
        if x.requires_grad and not y.requires_grad and torch.is_grad_enabled():
            self._lora_refuse_dead()
        return y

    def _lora_weight_and_bias(self) -> tuple[Any, Any]:
        held = self._parameters
        if self._lora.reads or "weight" not in held or "bias" not in held:
            return self._lora_own("weight"), self._lora_own("bias")
        return held["weight"], held["bias"]

    def _lora_refuse_dead(self) -> NoReturn:
        """Refuse to train what lies before a layer that computes without autograd."""
        weight = self._parameters.get(self.weight_of(type(self)))
        reason = reason_against("train", self, weight, loaded_kinds())
        remedy = "Run it within torch.no_grad(), or call train_only(model, None)"
        raise LayerError(
            f"a forward of a {type(self).__name__} with gradients",
            f"with its {type(weight).__name__} it hands no gradient to its input",
            remedy if reason is None else f"{reason.remedy}. {remedy}",
        )


def _is_torchs(plain: type[nn.Module], kind: type[nn.Module]) -> bool:
    """Whether the forward of a class is that of a class of torch, and its weight a parameter."""
    return plain.forward is kind.forward and _keeps_forward(plain) and not hasattr(plain, "weight")


def _keeps_forward(cls: type[nn.Module]) -> bool:
    """Return whether a class computes by the code of its own module, which nobody has replaced.

    Some programs put their own function at `nn.Linear.forward`, for all layers of a process.
    """
    code = getattr(cls.forward, "__globals__", {})
    return bool(code.get("__name__") == defines_forward(cls)[0])


_CONV1D = ("transformers.pytorch_utils", "Conv1D")


class LoRAConv1D(LoRALinear):
    """Forward update of a linear layer with the transposed weight."""

    kind = "conv1d"
    transposed = True

    @classmethod
    def matches(cls, layer: type[nn.Module]) -> bool:
        """Return whether a class is, or derives from, transformers' Conv1D."""
        return derives_from(layer, *_CONV1D)

    @staticmethod
    def geometry(module: Any) -> Geometry:
        """Return the widths, `nx` in and `nf` out."""
        n_in, n_out = int(module.nx), int(module.nf)
        return Geometry(n_in, n_out, (n_in, n_out), transposed=True)

    @staticmethod
    def stock(plain: type[nn.Module]) -> bool:
        """Return whether `forward` is Conv1D's own, and the weight a parameter."""
        is_known = defines_forward(plain) == _CONV1D and _keeps_forward(plain)
        return is_known and not hasattr(plain, "weight")


# --------------------------------------------------------------------------------------- embeddings


class LoRAEmbedding(ForwardUpdate):
    """Forward update of `nn.Embedding`: `W[ids] + scale * A[:, ids]^T B^T`.

    The table is a weight `(num, dim)` whose input is a one-hot vector, so `x A^T` is a lookup in A.
    As in the paper's code (loralib `layers.Embedding`), A starts at zero and B is random: rows of
    tokens that are not in the training data do not change. One with `max_norm`, whose forward
    writes to the table, is refused.
    """

    kind = "embedding"
    classes = (nn.Embedding,)
    padding_idx: int | None
    scale_grad_by_freq: bool
    sparse: bool

    @staticmethod
    def geometry(module: Any) -> Geometry:
        """Return the table's length as the input and its width as the output."""
        num, dim = int(module.num_embeddings), int(module.embedding_dim)
        return Geometry(num, dim, (num, dim), transposed=True)

    @classmethod
    def adds_to_output(cls, module: nn.Module, *, stock: bool) -> bool:
        """Return False for `scale_grad_by_freq`, which changes the gradient of a read weight."""
        return stock and not module.scale_grad_by_freq

    @staticmethod
    def stock(plain: type[nn.Module]) -> bool:
        """Return whether `forward` is nn.Embedding's own, and the weight a parameter."""
        return _is_torchs(plain, nn.Embedding)

    def _lora_with_updates(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        updates: Sequence[Update],
        gains: Gains | None = None,
    ) -> Any:
        """Look rows up with a sum of updates, and multiply by a gain."""
        ids, weight = self._lora_input(args, kwargs), self._lora_own("weight")
        if hasattr(weight, "full_tensor"):  # a DTensor does not support adding to single rows
            rows = self._lora_rows(ids, formed_weight(self))
        else:
            base = self._lora_rows(ids, weight)
            # Rounding is multiplied by a gain, so it waits for the sum.
            float32 = self._lora.float32 or gains is not None
            rows = embedding(base, ids, updates, self.padding_idx, float32=float32)
        if gains is None:
            return rows
        gain = gains.of_outputs
        if self.padding_idx is not None:  # no gradient from the padding row
            gain = torch.where((ids == self.padding_idx).unsqueeze(-1), gain.detach(), gain)
        return gained(rows, gain, None)

    def _lora_without_updates(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look rows up in the plain table, which stays as it is: other rows may have adapters."""
        return self._lora_rows(self._lora_input(args, kwargs), self._lora_own("weight"))

    def _lora_rows(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Look up rows as nn.Embedding does."""
        options = {"scale_grad_by_freq": self.scale_grad_by_freq, "sparse": self.sparse}
        return F.embedding(ids, weight, self.padding_idx, **options)


# ------------------------------------------------------------------- layers whose weight is read


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


# ---------------------------------------------------------------------------------------- the table

_BUILT_IN = (LoRALinear, LoRAConv1D, LoRAEmbedding, LoRAConv, LoRAConvTranspose)
KINDS: dict[str, type[Adapted]] = {row.kind: row for row in _BUILT_IN}
"""Each kind's class; the first that matches a layer's class is its kind."""


def kind_of(layer: type[nn.Module]) -> type[Adapted] | None:
    """Return the class of the first row that matches a layer's class."""
    return next((row for row in KINDS.values() if row.matches(layer)), None)


def register_kind(row: type[Adapted]) -> type[Adapted]:
    """Add a kind of layer from outside the package; it is asked before the built-in ones.

    Args:
        row: A class with a `kind` of its own, `matches` and `geometry`. Derived from `LoRALinear`
            it adds to the layer's output where its `adds_to_output` says that this is right;
            derived from `WeightUpdate` its weight reads as W + delta. The kind's name travels with
            saved adapters.

    Returns:
        The class, so that this can stand as a decorator.

    Raises:
        LayerError: The class has no kind of its own, or its name is taken by another class.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lora_inject.extending import Geometry, LoRALinear
        >>> from lora_inject.core.layers.kinds import kind_of
        >>> class Dense(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.kernel = nn.Parameter(torch.randn(4, 6))
        ...     def forward(self, x):
        ...         return x @ self.kernel
        >>> @register_kind
        ... class LoRADense(LoRALinear):
        ...     kind, weight_name = "dense", "kernel"
        ...     @classmethod
        ...     def matches(cls, layer):
        ...         return issubclass(layer, Dense)
        ...     @staticmethod
        ...     def geometry(module):
        ...         return Geometry(4, 6, (4, 6), transposed=True)
        >>> kind_of(Dense).kind
        'dense'
        >>> KINDS.pop("dense") is LoRADense
        True
    """
    asked = f"register_kind({getattr(row, '__name__', row)})"
    kind = row.__dict__.get("kind")
    if not kind or not issubclass(row, Adapted):
        raise LayerError(
            asked,
            "it is not an Adapted class with a kind of its own",
            "Derive from LoRALinear or WeightUpdate and set kind",
        )
    other = KINDS.get(kind, row)
    if (other.__module__, other.__qualname__) != (row.__module__, row.__qualname__):
        problem = f"kind {kind!r} is taken by {other.__module__}.{other.__qualname__}"
        raise LayerError(asked, problem, "Choose another name")
    others = {name: each for name, each in KINDS.items() if name != kind}
    KINDS.clear()
    KINDS.update({kind: row, **others})
    return row
