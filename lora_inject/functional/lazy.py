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
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_inject.errors import LayerError
from lora_inject.functional.factors import needs_plain_operations
from lora_inject.functional.gain import Gain
from lora_inject.functional.linear import differentiate
from lora_inject.functional.products import (
    grouped_product,
    looked_up,
    product_from_left,
    product_from_right,
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
        gain: The factor on the outputs of the sum; with one, no product is taken thinly.

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
    return LazyWeight.of(_Read(weight, updates, gain, used))


def _can_wait(weight: Tensor, stacked: bool, float32: bool) -> bool:
    return (
        type(weight) in PLAIN
        and weight.dim() == (3 if stacked else 2)
        and weight.is_floating_point()
        and not (float32 and weight.dtype.itemsize < 4)
        and not needs_plain_operations()
    )


class _Read:
    """One reading of a weight, which all views of it share.

    Attributes:
        leaves: The weight, and every tensor of its updates and of its gain.
        formed: The effective weight, once it was needed.
    """

    def __init__(
        self,
        weight: Tensor,
        updates: Sequence[Update],
        gain: Gain | None,
        used: Callable[[], None],
    ) -> None:
        self.weight, self.updates, self.gain = weight, updates, gain
        factors = [t for _, A, B, _ in updates for t in (A, B)]
        self.leaves = [weight, *factors, *(gain.tensors.values() if gain is not None else ())]
        self.formed: Tensor | None = None
        self._versions = self._versions_now()
        self._used: Callable[[], None] | None = used
        self._grad = torch.is_grad_enabled()
        self._value: LowRank | None = None
        self._matrices: dict[torch.dtype | None, list[LowRank]] = {}

    def _versions_now(self) -> list[int]:
        return [0 if t.is_inference() else t._version for t in self.leaves]

    def mode(self) -> Any:
        """Return the context in which the reading is computed."""
        return torch.set_grad_enabled(self._grad)

    def anew(self) -> LowRank:
        """Return the sum, computed anew."""
        if not self.updates:
            return LowRank(self.weight, ())
        return low_rank(self.weight, self.updates, self.gain)

    def value(self) -> LowRank:
        """Return the sum that the weight represents.

        Raises:
            LayerError: The weight or its adapter has changed since it was read.
        """
        if self._versions_now() != self._versions:
            raise LayerError(
                "using a weight that was read in an earlier forward",
                "its adapter, or the weight itself, was changed since",
                "Read the weight again from its module, or keep a .clone() of it",
            )
        if self._used is not None:
            self._used()
            self._used = None
        if self._value is None:
            with self.mode():
                self._value = self.anew()
        return self._value

    def matrix(self, index: int, *, to_multiply: bool) -> LowRank:
        """Return one matrix of a stack, with factors in the dtype of their products.

        In training all are cast and cut at once, so the gradient of A is joined and cast once. In
        inference few of many experts may be used, so each is cast alone.
        """
        base, terms, float32, _ = self.value()
        narrow = to_multiply and self._grad and not float32 and not _is_autocast(base)
        dtype = base.dtype if narrow else None
        if dtype not in self._matrices:
            with self.mode():
                cut = [
                    (_cut(left.to(dtype)), _cut(right.to(dtype)), scale)
                    for left, right, scale in terms
                ]
            self._matrices[dtype] = [
                LowRank(
                    one, tuple((left[i], right[i], scale) for left, right, scale in cut), float32
                )
                for i, one in enumerate(base.unbind())
            ]
        return self._matrices[dtype][index]


class LazyWeight(Tensor):
    """Stands for a weight with its updates; operations without a thin form use the formed sum.

    It is the whole weight that was read, one matrix of it, or some (`index`), maybe transposed.
    """

    _read: _Read
    _index: int | Tensor | None
    _is_turned: bool
    _formed: Tensor | None
    _gathered: LowRank | None

    @staticmethod
    def of(read: _Read, index: int | Tensor | None = None, turned: bool = False) -> LazyWeight:
        """Make one, with a graph to every tensor of the reading."""
        gathered = None
        if isinstance(index, Tensor):
            whole = read.value()
            terms = tuple((left[index], right[index], scale) for left, right, scale in whole.terms)
            gathered = LowRank(whole.base[index], terms, whole.float32)
        base = read.weight
        like = gathered.base if gathered is not None else base if index is None else base[index]
        like = like.mT if turned else like
        made: LazyWeight
        if torch.is_grad_enabled():
            made = _Deferred.apply(read, index, turned, like, *read.leaves)  # type: ignore[no-untyped-call]
        else:
            made = _empty(like)
        made._read, made._index, made._is_turned = read, index, turned
        made._formed, made._gathered = None, gathered
        return made

    def some(self, index: int | Tensor | None, *, turn: bool = False) -> LazyWeight:
        """Return one matrix of a stack, some of them, or all, maybe transposed."""
        index = self._index if index is None else index
        return LazyWeight.of(self._read, index, self._is_turned != turn)

    def value(self, *, to_multiply: bool = True, turn: bool = False) -> LowRank:
        """Return the sum that it represents; raise if a tensor of it has changed."""
        found = self._read.value()
        if isinstance(self._index, int):
            found = self._read.matrix(self._index, to_multiply=to_multiply)
        elif self._gathered is not None:
            found = self._gathered
        if self._is_turned == turn:
            return found
        turned = tuple((right.mT, left.mT, scale) for left, right, scale in found.terms)
        return LowRank(found.base.mT, turned, found.float32)

    def is_thin(self) -> bool:
        """Whether products may be computed thinly.

        A formed weight may have a hook or a gradient of its own, so it is used. A gain applies to
        the sum, not to its terms.
        """
        return self._formed is None and self._read.formed is None and self._read.gain is None

    def formed(self) -> Tensor:
        """Return the effective weight as a plain tensor, formed once."""
        if self._formed is None:
            read, value = self._read, self.value(to_multiply=False)
            whole = self._index is None or read.gain is not None
            with read.mode():
                if whole and read.formed is None:
                    read.formed = read.value().formed(self.dtype)
                if read.formed is None:
                    self._formed = value.formed(self.dtype)
                else:
                    self._formed = _of(read.formed, self._index, self._is_turned)
        return self._formed

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
        if _changes(func, args, kwargs):
            raise LayerError(
                f"{func.__name__} on a weight with an adapter inside a forward",
                "what a forward reads is W + delta, which is nowhere stored",
                "Change a .clone() of it, change it outside of the forward, or merge first",
            )
        return func(*_replaced(args, LazyWeight.formed), **_replaced(kwargs, LazyWeight.formed))

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
    if lazy.is_thin():
        return lazy.value(to_multiply=False).formed(lazy.dtype).detach()
    return lazy.formed().detach()


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

    Tensors of other classes have their own arithmetic.
    """
    if isinstance(argument, LazyWeight):
        return argument.is_thin()
    if isinstance(argument, list | tuple):
        return all(map(_is_thin, argument))
    return not isinstance(argument, Tensor) or type(argument) in PLAIN


def _changes(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function changes a lazy weight."""
    name: str = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    in_place = in_place or (name[:3] == "__i" and hasattr(Tensor, "__" + name[3:]))  # __iadd__
    first = bool(args) and isinstance(args[0], LazyWeight)
    changes = in_place or name in ("__setitem__", "__set__") or bool(kwargs.get("inplace"))
    return (first and changes) or isinstance(kwargs.get("out"), LazyWeight)


def _empty(like: Tensor) -> LazyWeight:
    """Return a lazy weight that says what a tensor is like, without anything in it."""
    made: LazyWeight = Tensor._make_wrapper_subclass(
        LazyWeight, like.shape, like.stride(), dtype=like.dtype, device=like.device
    )
    return made


class _Deferred(torch.autograd.Function):
    """The autograd node of a lazy weight, for gradients with respect to the formed weight."""

    @staticmethod
    def forward(
        ctx: Any, read: _Read, index: Any, turned: bool, like: Tensor, *_: Tensor
    ) -> LazyWeight:
        ctx.how = read, index, turned
        return _empty(like)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        read, index, turned = ctx.how
        read.value()  # raises if it has changed
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            out = _of(read.anew().formed(read.weight.dtype), index, turned)
        needs = ctx.needs_input_grad[4:]
        return (*[None] * 4, *differentiate(out, read.leaves, needs, g, again=again))


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


def _of(whole: Tensor, index: int | Tensor | None, turned: bool) -> Tensor:
    """Return what a lazy weight is of the whole."""
    found = whole if index is None else whole[index]
    return found.mT if turned else found


def _turned(lazy: LazyWeight) -> LazyWeight:
    return lazy.some(None, turn=True)


def _t(lazy: LazyWeight) -> Any:
    return _turned(lazy) if lazy.dim() == 2 else NotImplemented


def _transpose(lazy: LazyWeight, dim0: int, dim1: int) -> Any:
    last = {lazy.dim() - 2, lazy.dim() - 1}
    return _turned(lazy) if {dim0 % lazy.dim(), dim1 % lazy.dim()} == last else NotImplemented


def _item(lazy: LazyWeight, index: Any) -> Any:
    """Return `lazy[index]`, where the index picks matrices of a stack."""
    if lazy.dim() != 3 or lazy._index is not None or isinstance(index, bool):
        return NotImplemented
    if isinstance(index, Tensor):
        if index.dtype in (torch.bool, torch.uint8) or index.dim() > 1:
            return NotImplemented
        return lazy.some(index if index.dim() else int(index))
    return lazy.some(index) if isinstance(index, int) else NotImplemented


def _matrices(lazy: LazyWeight, dim: int = 0) -> Any:
    if lazy.dim() != 3 or lazy._index is not None or dim not in (0, -3):
        return NotImplemented
    return tuple(map(lazy.some, range(lazy.shape[0])))


def _iterate(lazy: LazyWeight) -> Any:
    found = _matrices(lazy)
    return NotImplemented if found is NotImplemented else iter(found)


def _to(lazy: LazyWeight, what: Any) -> Any:
    return lazy if what in (lazy.dtype, lazy.device) else NotImplemented


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if isinstance(x, LazyWeight) or not _fit(x, weight) or weight.dim() != 2:
        return NotImplemented
    return product_from_right(x, weight.value(turn=True), bias)


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


def _addmm(bias: Tensor, x: Tensor, weight: Any) -> Any:
    """`torch.addmm` as transformers' Conv1D uses it."""
    plain = not isinstance(bias, LazyWeight) and bias.dim() == 1 and isinstance(weight, LazyWeight)
    if not plain or isinstance(x, LazyWeight) or not _fit(x, weight) or bias.dtype != x.dtype:
        return NotImplemented
    return product_from_right(x, weight.value(), bias)


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
    return x.device == weight.device and (x.dtype == weight.dtype or _is_autocast(x))


def _is_autocast(t: Tensor) -> bool:
    kind = t.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


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
    Tensor.__getitem__: _item,
    Tensor.__iter__: _iterate,
    Tensor.unbind: _matrices,
    Tensor.to: _to,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.mm: _mm,
    Tensor.bmm: _bmm,
    torch.t: _t,
    torch.transpose: _transpose,
    torch.unbind: _matrices,
    torch.matmul: _matmul,
    torch.mm: _mm,
    torch.bmm: _bmm,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.linear: _linear,
    torch._grouped_mm: _grouped_mm,
}

# Custom operations, which exist once their library is imported.
_ANSWERS_BY_NAME = {"transformers.grouped_mm_fallback": _grouped_fallback}
