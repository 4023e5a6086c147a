"""What is read of a weight with adapters: W + delta, formed only if an operation needs it.

Most models only select a matrix from a stack, transpose it and multiply with it. `LazyWeight` is a
tensor with the shape, dtype and graph of the effective weight, but without memory.

1. Questions about it are free.
2. Products with it are thin (`weight.LowRank`).
3. What selects or transposes, `.data` and `detach()` give a lazy weight again.
4. What writes to it is refused, as the schema of each operation tells: W would stay as it is.
5. Any other operation gets the effective weight, formed below autograd, and its gradient reaches A
   and B (`_Deferred`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_inject.core.functional.factors import (
    Patch,
    cast_stack,
    compute_dtype,
    without_autocast,
)
from lora_inject.core.functional.gain import Gain
from lora_inject.core.functional.plain_operations import add_thin, differentiate
from lora_inject.core.functional.torch_inside import is_watched
from lora_inject.core.functional.unstored import DEVICE, PICKED, called, unstored, writes
from lora_inject.core.functional.weight import LowRank, low_rank
from lora_inject.errors import LayerError
from lora_inject.private import look_up

PLAIN = (Tensor, nn.Parameter)
# What a Parameter has as `__torch_function__` runs a function, past that of any subclass.
_run_plainly: Any = nn.Parameter.__torch_function__


def lazy_weight(
    weight: Tensor,
    patches: Sequence[Patch],
    *,
    used: Callable[[], None] = lambda: None,
    looks: bool = False,
    gain: Gain | None = None,
) -> Tensor:
    """Return `W + sum of scale * B @ A`, times its gain: a `LazyWeight`, or formed at once.

    It is lazy if nothing traces or transforms the computation. `used` is called right before the
    first use of the value, and may raise. Reading shape, dtype or device of a lazy weight is not a
    use; with `looks` neither is what only shows or copies it.

    Examples:
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> spec = SiteSpec("w", "parameter", 4, 6, (3, 6, 4), rank=2, alpha=2, experts=3)
        >>> W, A, B = torch.randn(3, 6, 4), torch.randn(3, 2, 4), torch.randn(3, 6, 2)
        >>> lazy = lazy_weight(W, [Patch(spec, A, B)])
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(x @ lazy[1].T, x @ (W[1] + B[1] @ A[1]).T, atol=1e-5)
        True
    """
    is_known = type(weight) in PLAIN and weight.is_floating_point()
    if not is_known or torch.compiler.is_compiling() or is_watched():
        used()
        return low_rank(weight, patches, gain).formed(weight.dtype).reshape(weight.shape)
    read = Read(weight, patches, gain, used, looks)
    if not torch.is_grad_enabled():
        return _made(read, read.shape, weight.stride())
    deferred: Tensor = _Deferred.apply(read, *read.leaves)  # type: ignore[no-untyped-call]
    return deferred


class Read:
    """One reading of a weight, shared by all lazy weights that come from it.

    Attributes:
        leaves: The weight, and every tensor of its updates and of its gain.
        shape: That of the value.
        is_stack: Whether the weight is a stack, of which matrices are picked.
        is_thin: Whether products are thin. A gain applies to the sum, not to its terms, and a
            kernel is not a factor of a product.
    """

    def __init__(
        self,
        weight: Tensor,
        patches: Sequence[Patch],
        gain: Gain | None,
        used: Callable[[], None],
        looks: bool,
    ) -> None:
        stacked = patches[0].spec.experts is not None if patches else weight.dim() == 3
        matrices = weight.dim() == (3 if stacked else 2)
        self.weight, self.patches, self.gain, self.shape = weight, patches, gain, weight.shape
        factors = [t for patch in patches for t in (patch.A, patch.B)]
        self.leaves = [weight, *factors, *(gain.tensors.values() if gain is not None else ())]
        self.is_stack = matrices and weight.dim() == 3
        self.is_thin = matrices and gain is None
        self.mode = torch.is_grad_enabled()
        self._used: Callable[[], None] | None = used
        self._looks = looks
        self._versions = self._versions_now()
        self._matrices: dict[bool, list[LowRank]] = {}  # by whether factors stay wide

    def _versions_now(self) -> list[int]:
        return [0 if t.is_inference() else t._version for t in self.leaves]

    def check(self, *, look: bool = False) -> None:
        """Raise if the weight or its adapter has changed since; report the first use.

        A `look` only shows or copies the value.
        """
        if self._versions_now() != self._versions:
            raise LayerError(
                "using a weight that was read in an earlier forward",
                "its adapter, or the weight itself, was changed since",
                "Read the weight again from its module, or keep a .clone() of it",
            )
        if self._used is not None and not (look and self._looks):
            self._used()
            self._used = None

    def sum(self) -> LowRank:
        """Return the weight and its updates, with the graph of the caller, none below autograd."""
        return low_rank(self.weight, self.patches, self.gain)

    def formed(self) -> Tensor:
        """Return the same as one tensor in the weight's shape."""
        return self.sum().formed(self.weight.dtype).reshape(self.shape)

    @cached_property
    def whole(self) -> LowRank:
        """Return the same with the graph of the reading, for products."""
        with torch.set_grad_enabled(self.mode):
            return self.sum()

    def matrix(self, index: int) -> LowRank:
        """Return one matrix of a stack for products.

        In training all matrices are cast to the dtype of the products and unbound together, so the
        gradient of A is joined and cast once. In inference each matrix is taken separately, because
        few of many experts may be used.
        """
        base, terms, float32, _ = self.whole
        if not self.mode:
            return self.whole.at(index)
        wide = float32 or _is_autocast(base)
        if wide not in self._matrices:

            def cut(stack: Tensor) -> tuple[Tensor, ...]:
                return _cut(stack if wide else cast_stack(stack, base.dtype))

            each = [(cut(left), cut(right), s) for left, right, s in terms]
            self._matrices[wide] = [
                LowRank(one, tuple((left[i], right[i], s) for left, right, s in each), float32)
                for i, one in enumerate(base.unbind())
            ]
        return self._matrices[wide][index]


class LazyWeight(Tensor):
    """The weight that was read, or one or some of its matrices (`index`); maybe transposed."""

    _read: Read
    _index: int | Tensor | None
    _is_turned: bool
    _formed: Tensor | None
    _beneath: Tensor | None

    @property
    def is_stack(self) -> bool:
        """Whether it is a whole stack, of which matrices can be picked."""
        return self._read.is_stack and self._index is None

    def part(self, index: int | Tensor) -> LazyWeight:
        """Return one matrix of a stack, or some."""
        size = self.shape[1:]
        if isinstance(index, Tensor):
            return _made(self._read, (len(index), *size), None, index, self._is_turned)
        return _made(self._read, size, self.stride()[1:], index, self._is_turned)

    def turned(self) -> LazyWeight:
        """Return it transposed."""
        size, stride = ((*t[:-2], t[-1], t[-2]) for t in (self.shape, self.stride()))
        return _made(self._read, size, stride, self._index, not self._is_turned)

    def detached(self) -> LazyWeight:
        """Return the same without a graph."""
        return _made(self._read, self.shape, self.stride(), self._index, self._is_turned)

    def value(self) -> LowRank:
        """Return the sum that it represents, for products."""
        self._read.check()
        read, index = self._read, self._index
        if isinstance(index, int):
            weight = read.matrix(index)
        else:
            weight = read.whole if index is None else read.whole.at(index)
        return weight.turned() if self._is_turned else weight

    def formed(self, *, look: bool = False) -> Tensor:
        """Return the effective weight as a plain tensor with a graph, formed once."""
        if self._formed is None or not look:
            self._read.check(look=look)
        if self._formed is None:
            with torch.set_grad_enabled(self._read.mode):
                self._formed = self._form()
        return self._formed

    def beneath(self) -> Tensor:
        """Return the effective weight, formed once, for code that runs below autograd."""
        self._read.check()
        if self._beneath is None:
            self._beneath = self._form().detach()
        return self._beneath

    def _without_values(self) -> Tensor:
        layout = tuple(self.shape), self.stride()
        return torch.empty_strided(*layout, dtype=self.dtype, device="meta")

    def _form(self) -> Tensor:
        read, index = self._read, self._index
        # In the weight's own layout.
        formed = read.formed() if index is None else read.sum().at(index).formed(self.dtype)
        return formed.mT if self._is_turned else formed

    def _use_count(self) -> NoReturn:
        """Refuse `torch.utils.swap_tensors`, which asks it of both tensors before it swaps."""
        _refuse_change(torch.utils.swap_tensors)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch: by the rules above, or below autograd."""
        if func == _DEVICE:  # asked in each product: the shortest way
            return args[0]._read.weight.device
        if func in _WRITES:
            _refuse_change(func)
        if func in _DETACHES:
            return args[0].detached()
        kwargs = kwargs or {}
        result = _thin_product(func, args, kwargs)
        if result is not NotImplemented:
            return result
        if func in _HOOKS:
            _refuse_hook(func)
        if func == Tensor.__deepcopy__:
            return args[0].formed(look=True).detach().clone()
        if func in _LOOKS:
            return func(args[0].formed(look=True), *args[1:], **kwargs)
        if func in _GET_IT_FORMED:
            return called(func, args, kwargs, LazyWeight, LazyWeight.formed)
        return _run_plainly(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Select or transpose lazily, below autograd; form the weight for everything else."""
        if func is DEVICE:
            return args[0]._read.weight.device
        kwargs = kwargs or {}
        result = PICKED[func](*args) if func in PICKED else func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if writes(func, args, kwargs, LazyWeight):
            _refuse_change(func)
        beneath = LazyWeight.beneath
        if str(kwargs.get("device")) == "meta":  # which asks for no value
            beneath = LazyWeight._without_values
        return called(func, args, kwargs, LazyWeight, beneath)


def _refuse_change(func: object) -> NoReturn:
    """Raise for an operation that would change what was read."""
    raise LayerError(
        f"{getattr(func, '__name__', func)} on what was read of a weight with an adapter",
        "it is W + delta, which is nowhere stored, and W would stay as it is",
        'Change a .clone() of it, or W itself: layer.get_parameter("weight"). Where the layer has '
        "an adapter and is to be replaced, call merge(model, eject=True) first",
    )


def _refuse_hook(func: Callable[..., Any]) -> NoReturn:
    """Raise for what wants the gradient of the sum, which nobody computes."""
    raise LayerError(
        f"{func.__name__} on what was read of a weight with an adapter",
        "it is W + delta as it is now, a forward reads it anew, and products use its terms: the "
        "hook would see no gradient",
        "Register it on what trains, a Parameter of adapter_parameters(model) or "
        "layer.get_parameter(...), or on a .clone() that you compute with",
    )


def formed(weight: Any) -> Any:
    """Return a weight, lazy or not, as a plain tensor, for a caller that passes it to a kernel."""
    return weight.formed() if isinstance(weight, LazyWeight) else weight


def _made(
    read: Read,
    size: Sequence[int],
    stride: Sequence[int] | None,
    index: int | Tensor | None = None,
    turned: bool = False,
) -> LazyWeight:
    weight = read.weight
    made: LazyWeight = unstored(LazyWeight, size, stride, dtype=weight.dtype, device=weight.device)
    made._read, made._index, made._is_turned = read, index, turned
    made._formed = made._beneath = None
    return made


class _Deferred(torch.autograd.Function):
    """The autograd node of a lazy weight, for gradients with respect to the formed weight."""

    @staticmethod
    def forward(ctx: Any, read: Read, *_: Tensor) -> LazyWeight:
        ctx.read = read
        return _made(read, read.shape, read.weight.stride())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        read, again = ctx.read, torch.is_grad_enabled()
        read.check()
        with torch.enable_grad():
            out = read.formed()
        g = g.to_dense() if g.is_sparse else g  # of a lookup that asks for it
        return None, *differentiate(out, read.leaves, ctx.needs_input_grad[1:], g, again=again)


def _cut(stack: Tensor) -> tuple[Tensor, ...]:
    matrices: tuple[Tensor, ...] = _Cut.apply(stack)  # type: ignore[no-untyped-call]
    return matrices


class _Cut(torch.autograd.Function):
    """`stack.unbind()`; its backward makes one zero tensor for all matrices that were not used.

    Of 128 experts a batch may use eight: torch's own would launch 120 zeros for each factor.
    """

    @staticmethod
    def forward(ctx: Any, stack: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return stack.detach().unbind()

    @staticmethod
    def backward(_: Any, *grads: Tensor | None) -> Tensor:
        some = next(g for g in grads if g is not None)
        zero = some.new_zeros(()).expand_as(some)
        return torch.stack([zero if g is None else g for g in grads])


# --------------------------------------------------------------------------------------- products


def _thin_product(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return a product with a sum that is not formed; NotImplemented for all else."""
    product = _PRODUCTS.get(func) or _OF_LIBRARIES.get(str(func))
    if product is None:
        return NotImplemented
    # An option of None is one that was not given: `F.grouped_mm` hands all of its own on.
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    return product(*args, **kwargs) if _is_thin(product, args, kwargs) else NotImplemented


def _is_thin(product: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a product supports these arguments, and each of them allows thin products.

    Tensors of other classes have their own arithmetic.
    """
    known = product.__code__.co_varnames[: product.__code__.co_argcount]
    if len(args) > len(known) or not set(kwargs) <= set(known):
        return False
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    return all(
        t._read.is_thin
        if isinstance(t, LazyWeight)
        else type(t) in PLAIN and t.layout is torch.strided
        for t in tensors
    )


def _fit(x: Any, weight: Any) -> bool:
    """Whether torch would multiply a plain x by a lazy weight; if not, torch raises its error."""
    if type(x) not in PLAIN or not isinstance(weight, LazyWeight) or x.device != weight.device:
        return False
    return x.dtype == weight.dtype or _is_autocast(x)


def _is_autocast(t: Tensor) -> bool:
    kind = t.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    thin = _fit(x, weight) and weight.dim() == 2
    return weight.value().turned().product(x, bias) if thin else NotImplemented


def _addmm(bias: Tensor, x: Tensor, weight: Any) -> Any:
    """`torch.addmm` as a linear layer with the weight `(in, out)` uses it."""
    thin = _fit(x, weight) and type(bias) in PLAIN and bias.dim() == 1 and bias.dtype == x.dtype
    return weight.value().product(x, bias) if thin and weight.dim() == 2 else NotImplemented


def _matmul(left: Any, right: Any) -> Any:
    if _fit(left, right) and left.dim() > 1:
        return right.value().product(left)
    if _fit(right, left) and right.dim() in (2, 3):
        return left.value().times(right)
    return NotImplemented


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
    return weight.value().looked_up(ids, padding_idx)


def _grouped_mm(x: Tensor, weight: Any, offs: Tensor | None = None) -> Any:
    return _grouped(_GROUPED_MM[0], x, weight, offs)


def _grouped_fallback(x: Tensor, weight: Any, offs: Tensor) -> Any:
    """`transformers.integrations.moe`: the replacement for `torch._grouped_mm`."""
    return _grouped(torch.ops.transformers.grouped_mm_fallback, x, weight, offs)


def _grouped(multiply: Callable[..., Tensor], x: Tensor, weight: Any, offs: Tensor | None) -> Any:
    thin = type(x) in PLAIN and isinstance(weight, LazyWeight) and x.dtype == weight.dtype
    if not thin or offs is None or x.dim() != 2 or weight.dim() != 3:
        return NotImplemented
    return grouped_product(weight.value(), multiply, x, offs)


# Those of them that this torch has; the first is the one that is called.
_GROUPED_MM = [
    function
    for function in (look_up("torch._grouped_mm"), getattr(F, "grouped_mm", None))
    if function is not None
]
_PRODUCTS: dict[Any, Callable[..., Any]] = {
    F.embedding: _embedding,
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.bmm: _matmul,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.bmm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    **dict.fromkeys(_GROUPED_MM, _grouped_mm),
}
# Custom operations by name, as they exist once their library is imported.
_OF_LIBRARIES = {"transformers.grouped_mm_fallback": _grouped_fallback}
_DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]
_DETACHES = {Tensor.data.__get__, Tensor.detach}  # type: ignore[attr-defined]
# Writes that no operation with a schema tells of; `x.data = W` would make the memory of W writable.
_WRITES = {Tensor.data.__set__, Tensor.requires_grad_, Tensor.__setitem__}  # type: ignore[attr-defined]
_HOOKS = {Tensor.register_hook, Tensor.retain_grad}
_LOOKS = {
    Tensor.__array__,
    Tensor.__reduce_ex__,
    Tensor.__repr__,
    Tensor.data_ptr,
    Tensor.numpy,
    Tensor.tolist,
}
# They read the memory, or are no product with a matrix: backward would form the weight again.
_GET_IT_FORMED = {
    F.bilinear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    F.multi_head_attention_forward,
    Tensor.__dlpack__,
    Tensor.storage,
    Tensor.untyped_storage,
}


def grouped_product(
    stack: LowRank, multiply: Callable[..., Tensor], x: Tensor, offs: Tensor
) -> Tensor:
    """Return the product of groups of rows, each with a matrix of its own.

    `multiply` is called as `torch._grouped_mm` is: x `(rows, m)`, sorted by group, a stack of
    matrices, and the end of each group. Rows behind the last are what it leaves there.
    """

    def of_groups(rows: Tensor, factor: Tensor) -> Tensor:
        is_one = len(factor) > 1 and factor.stride(0) == 0  # that all groups share
        return torch.matmul(rows, factor[0]) if is_one else multiply(rows, factor, offs=offs)

    y = multiply(x, stack.base, offs=offs)
    for left, right, scale in stack.terms:
        # The kernels need rows of a multiple of 16 bytes, which a small rank does not give.
        itemsize = compute_dtype(y.dtype, stack.float32).itemsize
        missing = -left.shape[-1] % max(1, 16 // itemsize)
        factors = _padded(left, (0, missing)), _padded(right, (0, 0, 0, missing))
        with without_autocast(y) or nullcontext():
            y = add_thin(y, x, *factors, scale, float32=stack.float32, multiply=of_groups)
    return y


def _padded(stack: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Return a stack with zeros at its end; a matrix that all share is padded once."""
    if not any(padding):
        return stack
    is_one = len(stack) > 1 and stack.stride(0) == 0
    return F.pad(stack[:1], padding).expand(len(stack), -1, -1) if is_one else F.pad(stack, padding)
