"""What is read of a weight with adapters: W + delta, formed only if an operation needs it.

Most models only select a matrix from a stack, transpose it and multiply with it. `LazyWeight` is a
tensor with the shape, dtype and graph of the effective weight, but without memory.

1. Questions about it are free.
2. Every view of it is a lazy weight again: the schema of the operation has an alias and no write.
3. Products are thin (`weight.LowRank`) with all of it, with matrices picked from a stack, and with
   these transposed.
4. What writes to it is refused, as the schema of each operation tells: W would stay as it is. What
   hands its memory on is refused, too, and an array of it is read-only.
5. Any other operation gets the effective weight, formed below autograd, and its gradient reaches A
   and B (`_Deferred`). None does from what is detached.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
import torch.utils.dlpack
from torch import Tensor, nn
from torch._ops import OpOverload

from lora_inject.core.functional.factors import Patch
from lora_inject.core.functional.gain import Gain
from lora_inject.core.functional.patches import patch
from lora_inject.core.functional.plain_operations import differentiate
from lora_inject.core.functional.read import Read, View, is_autocast
from lora_inject.core.functional.torch_inside import is_watched, resolving
from lora_inject.core.functional.unstored import DEVICE, called, is_view, unstored, writes
from lora_inject.core.functional.weight import low_rank
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
    kept: bool = False,
    gain: Gain | None = None,
) -> Tensor:
    """Return `W + sum of scale * B @ A`, times its gain: a `LazyWeight`, or formed at once.

    It is lazy if nothing traces or transforms the computation. `used` is called right before the
    first use of the value, and may raise. Reading shape, dtype or device of a lazy weight is not a
    use; with `looks` neither is what only shows or copies it. With `kept` it may be used later with
    gradients, though they are disabled now.

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
    if torch.is_grad_enabled():
        return _attached(read)
    if kept:
        with torch.inference_mode(False), torch.enable_grad():
            return _attached(read)
    return _made(View(read), read.shape, weight.stride(), weight.dtype, cls=Unattached)


class LazyWeight(Tensor):
    """What was read of a weight, or a view of it."""

    # A slot of its own: `torch.utils.swap_tensors` refuses tensors of different slots.
    __slots__ = ("_view",)
    _view: View

    def _seen(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return what an operation makes of it that copies nothing."""
        view = self._view
        is_cut = view.is_cut or func is _DETACH or not torch.is_grad_enabled()
        if view.layout is None:
            view.layout = self._without_values()

        def lazy(out: Tensor, i: int | None = None) -> LazyWeight:
            def step(formed: Tensor) -> Tensor:
                made = func(formed, *args, **kwargs)
                made = made if i is None else made[i]
                return made.resolve_conj().resolve_neg()  # type: ignore[no-any-return]

            out = out.conj() if out.is_conj() else out  # no lazy tensor has these bits
            out = torch._neg_view(out) if out.is_neg() else out
            seen = View(view.read, None, False, is_cut, (view, step), out)
            if func is _DETACH and view.step is None:
                seen = View(view.read, view.index, view.is_turned, is_cut)
            return self._made(seen, out.shape, out.stride(), out.dtype, out.storage_offset())

        made = func(view.layout, *args, **kwargs)
        return lazy(made) if isinstance(made, Tensor) else list(map(lazy, made, range(len(made))))

    def _part(self, index: int | Tensor) -> LazyWeight:
        """Return one matrix of a stack, or some."""
        size, stride = self.shape[1:], None
        if isinstance(index, Tensor):
            size = torch.Size((len(index), *size))
        else:
            stride = self.stride()[1:]
        return self._picked(size, stride, index, self._view.is_turned)

    def _turned(self) -> LazyWeight:
        """Return it transposed."""
        size, stride = ((*t[:-2], t[-1], t[-2]) for t in (self.shape, self.stride()))
        return self._picked(size, stride, self._view.index, not self._view.is_turned)

    def _picked(
        self,
        size: Sequence[int],
        stride: Sequence[int] | None,
        index: int | Tensor | None,
        is_turned: bool,
    ) -> LazyWeight:
        is_cut = self._view.is_cut or not torch.is_grad_enabled()
        return self._made(View(self._view.read, index, is_turned, is_cut), size, stride, self.dtype)

    def _made(self, view: View, *layout: Any) -> LazyWeight:
        """Return a view of it; in inference mode it is a tensor of that mode if this one is."""
        if torch.is_inference_mode_enabled() and not self.is_inference():
            with torch.inference_mode(False):
                return _made(view, *layout)
        return _made(view, *layout)

    def beneath(self) -> Tensor:
        """Return the effective weight, formed once, for code that runs below autograd.

        Some of it asks whether there will be a backward: `torch.sparse.mm(..., "amax")` does.
        """
        formed = self._view.beneath()
        return formed.detach().requires_grad_() if self.requires_grad else formed

    def _shown(self) -> Tensor:
        """Return the effective weight for a look."""
        return self._view.formed(look=True)

    def _without_values(self) -> Tensor:
        layout = tuple(self.shape), self.stride()
        return torch.empty_strided(*layout, dtype=self.dtype, device="meta")

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse what would be set on W: what is detached is the caller's own but for its data."""
        if not self._view.is_cut or name in ("data", "_is_param"):
            _refuse_change("nn.Parameter" if name == "_is_param" else f"setting {name}")
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: object) -> Tensor:
        """Return the effective weight as a plain tensor without a graph."""
        return self._view.beneath(look=True).clone()

    def __copy__(self) -> LazyWeight:
        """Return itself: it cannot change."""
        return self

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
            return args[0]._view.read.weight.device
        kwargs = kwargs or {}
        if cls is not LazyWeight and torch.is_grad_enabled() and func not in _LOOKS:
            return called(func, args, kwargs, Unattached, Unattached.attached)
        result = _thin_product(func, args, kwargs)
        if result is not NotImplemented:
            return result
        if func in _WRITES or (func in _OF_OWN and not args[0]._view.is_cut):
            _refuse_change(func.__name__)
        if func in _HOOKS and not args[0]._view.is_cut:
            _refuse_hook(func)
        if func in _LOOKS:
            shown = args[0]._shown()
            return _read_only(func(shown, *args[1:], **kwargs), shown)
        if func in _GET_IT_FORMED and not any(map(_is_own_leaf, (*args, *kwargs.values()))):
            return called(func, args, kwargs, LazyWeight, formed)
        return _run_plainly(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """View lazily, below autograd; form the weight for everything else."""
        if func is DEVICE:
            return args[0]._view.read.weight.device
        kwargs = kwargs or {}
        result = _PICKED[func](*args) if func in _PICKED else NotImplemented
        if result is not NotImplemented:
            return result
        with resolving():
            if isinstance(func, OpOverload):
                result = func.decompose(*args, **kwargs)  # in inference mode
            if result is NotImplemented and is_view(func) and isinstance(args[0], LazyWeight):
                result = args[0]._seen(func, args[1:], kwargs)
            if result is not NotImplemented:
                return result
            if writes(func, args, kwargs, LazyWeight) or func is _SHARES:
                _refuse_change(func)
            beneath = LazyWeight.beneath
            if str(kwargs.get("device")) == "meta":  # which asks for no value
                beneath = LazyWeight._without_values
            return called(func, args, kwargs, LazyWeight, beneath)


class Unattached(LazyWeight):
    """What a forward has read under `no_grad`: it gets its node, which is dear, when one is due."""

    __slots__ = ()

    def attached(self) -> LazyWeight:
        """Return the same as if it had been read with gradients."""
        return _attached(self._view.read)

    def _shown(self) -> Tensor:
        return self._view.beneath(look=True)


def _refuse_change(what: object) -> NoReturn:
    """Raise for an operation that would change what was read."""
    raise LayerError(
        f"{getattr(what, '__name__', what)} on what was read of a weight with an adapter",
        "it is W + delta, which is nowhere stored, and W would stay as it is",
        'Change a .clone() of it, or W itself: layer.get_parameter("weight"). Where the layer has '
        "an adapter and is to be replaced, call merge(model, eject=True) first",
    )


def _refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that asks no class of its tensors, and takes none that was read."""

    @functools.wraps(function)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(t, LazyWeight) for t in (*args, *kwargs.values())):
            _refuse_change(function)
        return function(*args, **kwargs)

    return refusing


patch(torch.utils, "swap_tensors", _refusing)
for _module in (torch, torch.utils.dlpack):  # else a pointer to nothing, and the end of the process
    patch(_module, "to_dlpack", _refusing)


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
    return weight._view.formed() if isinstance(weight, LazyWeight) else weight


def _is_own_leaf(t: object) -> bool:
    """Whether a caller has made a leaf of a detached one, which gets its gradient by autograd."""
    is_cut = isinstance(t, LazyWeight) and t._view.is_cut and torch.is_grad_enabled()
    return is_cut and t.requires_grad  # type: ignore[attr-defined]


def _read_only(made: Any, formed: Tensor) -> Any:
    """Return what shows a formed weight; an array over its memory cannot be written to."""
    if hasattr(made, "setflags") and made.ctypes.data == formed.data_ptr():
        made.setflags(write=False)
    return made


def _made(
    view: View,
    size: Sequence[int],
    stride: Sequence[int] | None,
    dtype: torch.dtype,
    offset: int = 0,
    cls: type[LazyWeight] = LazyWeight,
) -> LazyWeight:
    device = view.read.weight.device
    made: LazyWeight = unstored(cls, size, stride, dtype=dtype, device=device, offset=offset)
    _set_view(made, view)
    return made


_set_view = LazyWeight._view.__set__  # type: ignore[attr-defined]

# ------------------------------------------------------------- views with which products stay thin


def _permuted(stack: Any, dims: Sequence[int] = (1, 0)) -> Any:
    n, (*before, m, k) = stack.dim(), range(stack.dim())
    turns = stack._view.step is None and [d % n for d in dims] == [*before, k, m]
    return stack._turned() if turns else NotImplemented


def _transposed(stack: Any, dim0: int, dim1: int) -> Any:
    n = stack.dim()
    turns = stack._view.step is None and {dim0 % n, dim1 % n} == {n - 2, n - 1}
    return stack._turned() if turns else NotImplemented


def _selected(stack: Any, dim: int, index: int) -> Any:
    picks = stack._view.is_stack and dim in (0, -3)
    return stack._part(index % len(stack)) if picks else NotImplemented


def _unbound(stack: Any, dim: int = 0) -> Any:
    picks = stack._view.is_stack and dim in (0, -3)
    return [stack._part(i) for i in range(len(stack))] if picks else NotImplemented


def _gathered(stack: Any, indices: Sequence[Tensor | None]) -> Any:
    (index, *others) = indices
    if others or not stack._view.is_stack or index is None or index.dim() != 1:
        return NotImplemented
    return NotImplemented if index.dtype in (torch.bool, torch.uint8) else stack._part(index)


_PICKED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.t.default: _permuted,
    torch.ops.aten.permute.default: _permuted,
    torch.ops.aten.transpose.int: _transposed,
    torch.ops.aten.select.int: _selected,
    torch.ops.aten.unbind.int: _unbound,
    torch.ops.aten.index.Tensor: _gathered,
}

# --------------------------------------------------------------------------------------- the node


def _attached(read: Read) -> LazyWeight:
    """Return what was read, with its node of autograd."""
    deferred: LazyWeight = _Deferred.apply(read, *read.leaves)  # type: ignore[no-untyped-call]
    return deferred


class _Deferred(torch.autograd.Function):
    """The autograd node of a lazy weight, for gradients with respect to the formed weight."""

    @staticmethod
    def forward(ctx: Any, read: Read, *_: Tensor) -> LazyWeight:
        ctx.read, weight = read, read.weight
        return _made(View(read), read.shape, weight.stride(), weight.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        read, again = ctx.read, torch.is_grad_enabled()
        read.check()
        with torch.enable_grad():
            out = read.formed()
        g = g.to_dense() if g.is_sparse else g  # of a lookup that asks for it
        return None, *differentiate(out, read.leaves, ctx.needs_input_grad[1:], g, again=again)


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
        t._view.step is None and t._view.read.is_thin and not _is_own_leaf(t)
        if isinstance(t, LazyWeight)
        else type(t) in PLAIN and t.layout is torch.strided
        for t in tensors
    )


def _fit(x: Any, weight: Any) -> bool:
    """Whether torch would multiply a plain x by a lazy weight; if not, torch raises its error."""
    if type(x) not in PLAIN or not isinstance(weight, LazyWeight) or x.device != weight.device:
        return False
    return x.dtype == weight.dtype or is_autocast(x)


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    thin = _fit(x, weight) and weight.dim() == 2
    return weight._view.value().turned().product(x, bias) if thin else NotImplemented


def _addmm(bias: Tensor, x: Tensor, weight: Any) -> Any:
    """`torch.addmm` as a linear layer with the weight `(in, out)` uses it."""
    thin = _fit(x, weight) and type(bias) in PLAIN and bias.dim() == 1 and bias.dtype == x.dtype
    return weight._view.value().product(x, bias) if thin and weight.dim() == 2 else NotImplemented


def _matmul(left: Any, right: Any) -> Any:
    if _fit(left, right) and left.dim() > 1:
        return right._view.value().product(left)
    if _fit(right, left) and right.dim() in (2, 3):
        return left._view.value().times(right)
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
    return weight._view.value().looked_up(ids, padding_idx)


def _grouped_mm(x: Tensor, weight: Any, offs: Tensor | None = None) -> Any:
    return _grouped(_GROUPED_MM[0], x, weight, offs)


def _grouped_fallback(x: Tensor, weight: Any, offs: Tensor) -> Any:
    """`transformers.integrations.moe`: the replacement for `torch._grouped_mm`."""
    return _grouped(torch.ops.transformers.grouped_mm_fallback, x, weight, offs)


def _grouped(multiply: Callable[..., Tensor], x: Tensor, weight: Any, offs: Tensor | None) -> Any:
    thin = type(x) in PLAIN and isinstance(weight, LazyWeight) and x.dtype == weight.dtype
    if not thin or offs is None or x.dim() != 2 or weight.dim() != 3:
        return NotImplemented
    return weight._view.value().grouped(multiply, x, offs)


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
_DETACH = torch.ops.aten.detach.default
_SHARES = torch.ops.aten.set_.source_Tensor  # its schema does not tell that two have one memory
# Writes without a schema, and what hands on memory that could be written to.
_WRITES = {
    Tensor.__dlpack__,
    Tensor.apply_,
    Tensor.map_,
    Tensor.map2_,
    Tensor.share_memory_,
    Tensor.storage,
    Tensor.untyped_storage,
}
_OF_OWN = {Tensor.requires_grad_}  # of a detached one, which is the caller's own
_HOOKS = {Tensor.register_hook, Tensor.retain_grad}
_LOOKS = {
    Tensor.__array__,
    Tensor.__format__,
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
}
