"""A weight with its updates that is formed only where it must be.

Most models do nothing with a weight but pick a matrix out of a stack of them, turn it and
multiply with it. `LazyWeight` is a tensor that answers exactly these with the thin products of
`functional.products`. Whatever else is asked of it forms the effective weight, once, and asks that.

It has the shape, dtype and graph of the effective weight, but no memory: code that gets past
`__torch_function__`, as the inputs of a custom autograd Function do, finds a formed weight beneath
autograd (`__torch_dispatch__`), and its gradient finds the way to A and B (`_Deferred`). Nothing
ever finds the raw weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_inject.errors import LayerError
from lora_inject.functional.factors import needs_plain_operations
from lora_inject.functional.gain import Gain
from lora_inject.functional.products import (
    grouped_product,
    looked_up,
    product_from_left,
    product_from_right,
    summed,
)
from lora_inject.functional.weight import LowRank, Update, effective_weight, low_rank

PLAIN = (Tensor, nn.Parameter)


def lazy_weight(
    weight: Tensor,
    updates: Sequence[Update],
    *,
    float32: bool,
    used: Callable[[], None] = lambda: None,
    gain: Gain | None = None,
) -> Tensor:
    """Return what `effective_weight` does, formed only where it must be.

    Args:
        weight: The frozen tensor, any shape that `spec.weight_shape` states.
        updates: `(spec, A, B, scale)` for each update.
        float32: Return float32 instead of rounding to the weight's dtype.
        used: Called when the value is first used, before it is; it may raise. A question about
            shape, dtype or device is no use, where the weight can wait.
        gain: What multiplies the outputs of the sum, which no product is taken through.

    Returns:
        A tensor of the weight's shape: a `LazyWeight` where the weight is a plain matrix or a stack
        of them and nobody traces or transforms what is computed; else the effective weight.

    Examples:
        >>> from lora_inject.spec.sites import SiteSpec
        >>> spec = SiteSpec("w", "parameter", 4, 6, (3, 6, 4), rank=2, alpha=2, experts=3)
        >>> W, A, B = torch.randn(3, 6, 4), torch.randn(3, 2, 4), torch.randn(3, 6, 2)
        >>> lazy = lazy_weight(W, [(spec, A, B, 1.0)], float32=False)
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(x @ lazy[1].T, x @ (W[1] + B[1] @ A[1]).T, atol=1e-5)
        True
    """
    stacked = updates[0][0].experts is not None if updates else weight.dim() == 3
    if not _can_wait(weight, stacked, float32):
        used()
        return effective_weight(weight, updates, float32=float32, gain=gain)

    def make() -> LowRank:
        return low_rank(weight, updates, gain) if updates else LowRank(weight, ())

    if torch.is_grad_enabled() and gain is None:
        return LazyWeight.over(make(), used=used)
    watched = () if gain is None else gain.tensors.values()
    return LazyWeight.without_graph(weight, updates, make, used, watched)


def _can_wait(weight: Tensor, stacked: bool, float32: bool) -> bool:
    return (
        type(weight) in PLAIN
        and weight.dim() == (3 if stacked else 2)
        and weight.is_floating_point()
        and not (float32 and weight.dtype.itemsize < 4)
        and not needs_plain_operations()
    )


class LazyWeight(Tensor):
    """Stands for a weight with its updates; what it cannot answer thinly it forms first."""

    _value: LowRank | Callable[[], LowRank]
    # What it is a view of, and how; None for a weight as it was read, or a copy of some of it.
    _origin: tuple[LazyWeight, Callable[[Tensor], Tensor]] | None
    _formed: Tensor | None
    _matrices: list[LowRank] | None
    _grad_mode: bool
    _watched: list[Tensor]
    _versions: list[int]
    _used: Callable[[], None] | None
    _gained: bool

    @staticmethod
    def over(
        value: LowRank,
        origin: tuple[LazyWeight, Callable[[Tensor], Tensor]] | None = None,
        used: Callable[[], None] | None = None,
    ) -> LazyWeight:
        """Make one that stands for `value`, with a graph to all of its factors."""
        factors = [t for left, right, _ in value.terms for t in (left, right)]
        made: LazyWeight = _Deferred.apply(value, value.base, *factors)  # type: ignore[no-untyped-call]
        made._start(value, [] if origin else [value.base, *factors], origin, used)
        return made

    @staticmethod
    def without_graph(
        weight: Tensor,
        updates: Sequence[Update],
        make: Callable[[], LowRank],
        used: Callable[[], None],
        further: Collection[Tensor] = (),
    ) -> LazyWeight:
        """Make one that has no graph before it is formed, and costs little until it is used."""
        made: LazyWeight = _empty(weight)
        watched = [weight, *(t for _, A, B, _ in updates for t in (A, B)), *further]
        made._start(make, watched, None, used)
        made._gained = bool(further)
        return made

    def _start(
        self,
        value: LowRank | Callable[[], LowRank],
        watched: list[Tensor],
        origin: tuple[LazyWeight, Callable[[Tensor], Tensor]] | None,
        used: Callable[[], None] | None,
    ) -> None:
        self._value, self._origin, self._used = value, origin, used
        self._formed = self._matrices = None
        self._gained = False
        self._grad_mode = torch.is_grad_enabled()
        self._watched, self._versions = watched, _versions(watched)

    def value(self) -> LowRank:
        """Return the sum that it stands for.

        Raises:
            LayerError: The weight or its adapter has changed since it was read.
        """
        if self._origin is not None:
            self._origin[0].value()
        elif _versions(self._watched) != self._versions:
            raise LayerError(
                "using a weight that was read in an earlier forward",
                "its adapter, or the weight itself, was changed since",
                "Read the weight again from its module, or keep a .clone() of it",
            )
        elif self._used is not None:
            self._used()
            self._used = None
        if not isinstance(self._value, LowRank):
            with torch.set_grad_enabled(self._grad_mode):
                self._value = self._value()
        return self._value

    def formed(self, *, to_change: bool = False) -> Tensor:
        """Return the effective weight as a plain tensor: the one that reading it would have formed.

        Args:
            to_change: What is returned will be changed in place: let it share memory, as a view
                does, with that of the weight that this is a view of.
        """
        if self._formed is None:
            parent, view = self._origin or (None, None)
            if parent is not None and view is not None and (to_change or parent._is_formed()):
                return view(parent.formed(to_change=to_change))
            with torch.set_grad_enabled(self._grad_mode):
                self._formed = self.value().formed(self.dtype)
        return self._formed

    def _is_formed(self) -> bool:
        origin = self._origin
        return self._formed is not None or (origin is not None and origin[0]._is_formed())

    def matrix(self, index: int) -> LowRank:
        """Return one matrix of a stack.

        All are cut at once: the gradient of A is then put together once, and not once for each.
        """
        base, terms, float32, _ = self.value()
        if self._matrices is None:
            with torch.set_grad_enabled(self._grad_mode):
                cut = [(_cut(left), _cut(right), scale) for left, right, scale in terms]
            self._matrices = [
                LowRank(
                    one, tuple((left[i], right[i], scale) for left, right, scale in cut), float32
                )
                for i, one in enumerate(base.unbind())
            ]
        return self._matrices[index]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Answer a question about the shape, a view or a product; form the weight for the rest."""
        kwargs = kwargs or {}
        if func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        answer = _ANSWERS.get(func) or _ANSWERS_BY_NAME.get(str(func))
        if answer is not None and _may_answer(answer, args, kwargs):
            found = answer(*args, **kwargs)
            if found is not NotImplemented:
                return found
        if func is Tensor.data.__set__:  # type: ignore[attr-defined]
            raise LayerError(
                "setting .data of a weight with an adapter inside a forward",
                "what a forward reads is W + delta, which is nowhere stored",
                "Set it outside of the forward, or merge the adapter first",
            )
        to_change = _changes(func, kwargs)

        def form(t: LazyWeight) -> Tensor:
            return t.formed(to_change=to_change)

        return func(*_replaced(args, form), **_replaced(kwargs, form))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Form the weight beneath autograd, for code that has come past `__torch_function__`."""
        if func._schema.is_mutable:
            raise LayerError(
                f"{func} on a weight with an adapter",
                "code that torch cannot look into changes the effective weight in place",
                "Merge the adapter first, or clone the weight where it is changed",
            )
        return func(*_replaced(args, _beneath), **_replaced(kwargs or {}, _beneath))


def formed(weight: Any) -> Any:
    """Return a weight that may be lazy as a plain tensor, for who hands it to a kernel at once."""
    return weight.formed() if isinstance(weight, LazyWeight) else weight


def _beneath(lazy: LazyWeight) -> Tensor:
    """Return the effective weight without a graph: autograd has done its part, and keeps none."""
    if lazy._is_formed():
        return lazy.formed().detach()
    value = lazy.value()
    if value.gain is not None and lazy._grad_mode:
        raise LayerError(
            "a weight with a gain (DoRA) in code that torch cannot look into",
            "no gradient would reach the adapter from there",
            "Run it under torch.no_grad(), or merge the adapter first",
        )
    return value.formed(lazy.dtype).detach()


def _replaced(found: Any, form: Callable[[LazyWeight], Tensor]) -> Any:
    """Return arguments with a plain tensor for each lazy weight among them, at any depth."""
    if isinstance(found, LazyWeight):
        return form(found)
    if type(found) in (list, tuple):
        return type(found)(_replaced(one, form) for one in found)
    if type(found) is dict:
        return {key: _replaced(one, form) for key, one in found.items()}
    return found


def _may_answer(answer: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an answer knows these arguments by number and name, and all of them allow it."""
    known = answer.__code__.co_varnames[: answer.__code__.co_argcount]
    if not answer.__code__.co_flags & inspect.CO_VARARGS and len(args) > len(known):
        return False
    return set(kwargs) <= set(known) and all(map(_is_thin, (*args, *kwargs.values())))


def _is_thin(argument: Any) -> bool:
    """Whether an argument allows a thin answer.

    A weight that was formed may have been changed since, or carry a hook: it stays the one. Tensors
    of other classes have an arithmetic of their own.
    """
    if isinstance(argument, LazyWeight):
        return not argument._is_formed() and not argument._gained
    if isinstance(argument, list | tuple):
        return all(map(_is_thin, argument))
    return not isinstance(argument, Tensor) or type(argument) in PLAIN


def _changes(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function changes what it is given."""
    name: str = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _CHANGING or "out" in kwargs or bool(kwargs.get("inplace"))


def _versions(tensors: list[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]


def _empty(like: Tensor) -> LazyWeight:
    """Return a lazy weight that says what a tensor is like, without anything in it."""
    made: LazyWeight = Tensor._make_wrapper_subclass(
        LazyWeight, like.shape, like.stride(), dtype=like.dtype, device=like.device
    )
    return made


class _Deferred(torch.autograd.Function):
    """The node of a lazy weight, for who differentiates by it as if it had been formed."""

    @staticmethod
    def forward(ctx: Any, value: LowRank, base: Tensor, *factors: Tensor) -> LazyWeight:
        ctx.scales = [scale for _, _, scale in value.terms]
        ctx.save_for_backward(*factors)
        return _empty(base)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        factors, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        grads: list[Tensor | None] = []
        for i, scale in enumerate(ctx.scales):
            left, right = factors[2 * i : 2 * i + 2]
            wide = g.to(left.dtype)
            grads.append(scale * (wide @ right.mT) if needs[2 * i] else None)
            grads.append(scale * (left.mT @ wide) if needs[2 * i + 1] else None)
        return None, g if ctx.needs_input_grad[1] else None, *grads


def _cut(stack: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _Cut.apply(stack)  # type: ignore[no-untyped-call]
    return found


class _Cut(torch.autograd.Function):
    """`stack.unbind()`, whose backward makes one zero for all matrices that were not used."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return stack.detach().unbind()

    @staticmethod
    def backward(_: Any, *grads: Tensor | None) -> Tensor:
        some = next(g for g in grads if g is not None)
        zero = some.new_zeros(()).expand_as(some)
        return torch.stack([zero if g is None else g for g in grads])


# ------------------------------------------------------------------------- questions and answers


def _view(lazy: LazyWeight, value: LowRank, view: Callable[[Tensor], Tensor]) -> LazyWeight:
    return LazyWeight.over(value, (lazy, view))


def _turned(lazy: LazyWeight) -> LazyWeight:
    base, terms, float32, _ = lazy.value()
    turned = tuple((right.mT, left.mT, scale) for left, right, scale in terms)
    value = LowRank(base.mT, turned, float32)
    return _view(lazy, value, lambda t: t.mT)


def _t(lazy: LazyWeight) -> Any:
    return _turned(lazy) if lazy.dim() == 2 else NotImplemented


def _transpose(lazy: LazyWeight, dim0: int, dim1: int) -> Any:
    last = {lazy.dim() - 2, lazy.dim() - 1}
    return _turned(lazy) if {dim0 % lazy.dim(), dim1 % lazy.dim()} == last else NotImplemented


def _item(lazy: LazyWeight, index: Any) -> Any:
    """Return `lazy[index]`, where the index picks matrices of a stack."""
    if lazy.dim() != 3 or isinstance(index, bool):
        return NotImplemented
    if isinstance(index, Tensor):
        if index.dtype in (torch.bool, torch.uint8) or index.dim() > 1:
            return NotImplemented
        return _picked(lazy, index) if index.dim() else _matrix(lazy, int(index))
    return _matrix(lazy, index) if isinstance(index, int) else NotImplemented


def _matrix(lazy: LazyWeight, index: int) -> LazyWeight:
    return _view(lazy, lazy.matrix(index), lambda t: t[index])


def _picked(lazy: LazyWeight, index: Tensor) -> LazyWeight:
    base, terms, float32, _ = lazy.value()
    chosen = tuple((left[index], right[index], scale) for left, right, scale in terms)
    return LazyWeight.over(LowRank(base[index], chosen, float32))


def _matrices(lazy: LazyWeight, dim: int = 0) -> Any:
    if lazy.dim() != 3 or dim not in (0, -3):
        return NotImplemented
    return tuple(_matrix(lazy, i) for i in range(lazy.shape[0]))


def _iterate(lazy: LazyWeight) -> Any:
    found = _matrices(lazy)
    return NotImplemented if found is NotImplemented else iter(found)


def _to(lazy: LazyWeight, what: Any) -> Any:
    return lazy if what in (lazy.dtype, lazy.device) else NotImplemented


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if isinstance(x, LazyWeight) or not _fit(x, weight) or weight.dim() != 2:
        return NotImplemented
    return product_from_right(x, _turned(weight).value(), bias)


def _matmul(left: Any, right: Any) -> Any:
    if not isinstance(left, LazyWeight):
        fit = _fit(left, right) and left.dim() > 1
        return product_from_right(left, right.value()) if fit else NotImplemented
    if isinstance(right, LazyWeight) or not _fit(right, left) or right.dim() < 2:
        return NotImplemented
    return product_from_left(left.value(), right)


def _mm(left: Any, right: Any) -> Any:
    return _matmul(left, right) if left.dim() == right.dim() == 2 else NotImplemented


def _bmm(left: Any, right: Any) -> Any:
    return _matmul(left, right) if left.dim() == right.dim() == 3 else NotImplemented


def _matmul_reversed(right: Any, left: Any) -> Any:
    return _matmul(left, right)


def _addmm(bias: Tensor, x: Tensor, weight: Any) -> Any:
    """`torch.addmm` as transformers' Conv1D uses it."""
    plain = not isinstance(bias, LazyWeight) and bias.dim() == 1 and isinstance(weight, LazyWeight)
    if not plain or isinstance(x, LazyWeight) or not _fit(x, weight) or bias.dtype != x.dtype:
        return NotImplemented
    return product_from_right(x, weight.value(), bias)


def _einsum(equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    where = [i for i, t in enumerate(operands) if isinstance(t, LazyWeight)]
    if not isinstance(equation, str) or len(where) != 1:
        return NotImplemented
    weight = operands[where[0]]
    before, after = list(operands[: where[0]]), list(operands[where[0] + 1 :])
    if not all(_fit(t, weight) for t in (*before, *after)):
        return NotImplemented
    return summed(equation, before, weight.value(), after)


def _embedding(
    ids: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    del norm_type
    if isinstance(ids, LazyWeight) or max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    return looked_up(weight.value(), ids, padding_idx)


def _grouped_mm(
    x: Tensor,
    weight: Any,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    return _grouped(torch._grouped_mm, x, weight, offs, bias, out_dtype)


def _grouped_fallback(x: Tensor, weight: Any, offs: Tensor) -> Any:
    """`transformers.integrations.moe`: what stands in for `torch._grouped_mm`."""
    return _grouped(torch.ops.transformers.grouped_mm_fallback, x, weight, offs)


def _grouped(
    multiply: Callable[..., Tensor], x: Tensor, weight: Any, offs: Tensor | None, *others: Any
) -> Any:
    if offs is None or isinstance(x, LazyWeight) or x.dim() != 2 or x.dtype != weight.dtype:
        return NotImplemented
    if not isinstance(weight, LazyWeight) or weight.dim() != 3:
        return NotImplemented
    if any(other is not None for other in others):
        return NotImplemented
    return grouped_product(multiply, x, weight.value(), offs)


def _fit(x: Tensor, weight: LazyWeight) -> bool:
    """Whether torch would multiply these two as they are; if not, its own message is best."""
    kind = x.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    return x.device == weight.device and (autocast or x.dtype == weight.dtype)


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


_ATTRIBUTES = "shape dtype device layout ndim requires_grad is_leaf grad_fn"
_METHODS = """__len__ dim element_size get_device is_complex is_contiguous is_floating_point
ndimension nelement numel size stride"""
_QUESTIONS = {
    *map(_getter, _ATTRIBUTES.split()),
    *(getattr(Tensor, name) for name in _METHODS.split()),
}

_ANSWERS: dict[Any, Callable[..., Any]] = {
    _getter("T"): _t,
    _getter("mT"): _turned,
    Tensor.t: _t,
    Tensor.transpose: _transpose,
    Tensor.swapaxes: _transpose,
    Tensor.__getitem__: _item,
    Tensor.__iter__: _iterate,
    Tensor.unbind: _matrices,
    Tensor.to: _to,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: _matmul_reversed,
    Tensor.mm: _mm,
    Tensor.bmm: _bmm,
    torch.t: _t,
    torch.transpose: _transpose,
    torch.swapaxes: _transpose,
    torch.unbind: _matrices,
    torch.matmul: _matmul,
    torch.mm: _mm,
    torch.bmm: _bmm,
    torch.addmm: _addmm,
    torch.einsum: _einsum,
    F.embedding: _embedding,
    F.linear: _linear,
    torch._grouped_mm: _grouped_mm,
}

# Custom operations, which exist once their library is imported.
_ANSWERS_BY_NAME = {"transformers.grouped_mm_fallback": _grouped_fallback}

_CHANGING = ("__setitem__", "__set__")
