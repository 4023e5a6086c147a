"""Stacked experts in few bits, of which each is unpacked where it is used, and never all of them.

The tensor has the shape and dtype of the stack and the memory of its codes. Selected, transposed,
stacked or joined it stays packed. A product unpacks its matrices one by one, and its backward
again, because autograd saves the codes. Any other operation unpacks what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lora_inject.core.functional.unstored import DEVICE, PICKED, unstored, writes
from lora_inject.errors import LayerError
from lora_inject.experts.stack_formats import StackFormat
from lora_inject.private import look_up, needed


class PackedExperts(Tensor):
    """A stack of matrices, or one matrix of it, held by the codes and scales of a format.

    Args:
        form: The format.
        parts: Its parts, of matrices `(..., out, in)`.
        dtype: Dtype of the values.
        is_turned: Whether the tensor's matrices are `(out, in)`, as the parts are, or `(in, out)`.

    Examples:
        >>> from lora_inject.experts.stack_formats import Mxfp4Stack
        >>> codes, scales = torch.full((2, 3, 16), 0x21), torch.full((2, 3, 1), 128)
        >>> parts = {"codes": codes.byte(), "scales": scales.byte()}
        >>> stack = PackedExperts(Mxfp4Stack(), parts, torch.float32)
        >>> stack.shape, (torch.ones(1, 32) @ stack[0]).tolist()
        (torch.Size([2, 32, 3]), [[48.0, 48.0, 48.0]])
    """

    reads_as_sum: ClassVar[bool] = True  # core.functional.weight asks
    form: StackFormat
    is_turned: bool

    @staticmethod
    def __new__(
        cls: type[PackedExperts],
        form: StackFormat,
        parts: Mapping[str, Tensor],
        dtype: torch.dtype,
        is_turned: bool = False,
    ) -> PackedExperts:
        """Make a tensor without memory of its own."""
        codes = parts["codes"]
        *lead, n_out, _ = codes.shape
        n_in = form.n_in(parts)
        size, stride = [*lead, n_out, n_in], [*([n_out * n_in] * len(lead)), n_in, 1]
        if not is_turned:
            size, stride = ([*t[:-2], t[-1], t[-2]] for t in (size, stride))
        needed("torch.Tensor._make_wrapper_subclass", "experts that stay packed")
        made: PackedExperts = unstored(cls, size, stride, dtype=dtype, device=codes.device)
        made.form, made.is_turned = form, is_turned
        for role in form.rows_of:  # attributes, by which torch moves and swaps them
            setattr(made, role, parts[role])
        return made

    __torch_function__ = nn.Parameter.__torch_function__  # none of its own

    @property
    def packed_again_by(self) -> str:
        """What to do where it is to be packed again, as `quantized.libraries` says it."""
        floats = 'write plain floats, merge(model, dequantize="bfloat16")'
        if not self.form.is_written_on_disk:
            return floats.capitalize()
        on_disk = "lora-inject merge BASE ADAPTER --requantize"
        return f"Save the adapter and merge on disk, {on_disk}; or {floats}"

    @property
    def parts(self) -> dict[str, Tensor]:
        """The format's parts."""
        return {role: getattr(self, role) for role in self.form.rows_of}

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        """Return what torch moves and swaps."""
        settings = {"form": self.form, "dtype": self.dtype, "is_turned": self.is_turned}
        return list(self.form.rows_of), settings

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], settings: dict[str, Any], size: Any, stride: Any
    ) -> PackedExperts:
        """Make it from what `__tensor_flatten__` returns."""
        del size, stride
        return PackedExperts(parts=inner, **settings)

    def __repr__(self) -> str:  # type: ignore[override]
        """Return format, shape and dtype; a print unpacks nothing."""
        return f"PackedExperts({self.form.title}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    def dequantize(self) -> Tensor:
        """Return the values, a new contiguous tensor."""
        return self.unpacked().contiguous()

    def unpacked(self) -> Tensor:
        """Return the values, a new tensor with the strides of this one."""
        values = self.form.values(self.parts).to(self.dtype)
        return values if self.is_turned else values.mT

    @property
    def is_stack(self) -> bool:
        """Whether there are matrices to pick."""
        return self.dim() == 3

    def part(self, index: int | Tensor) -> PackedExperts:
        """Return one matrix of a stack, or some."""
        return self._like(lambda t: t[index])

    def turned(self) -> PackedExperts:
        """Return it transposed."""
        return PackedExperts(self.form, self.parts, self.dtype, not self.is_turned)

    def _like(
        self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None
    ) -> PackedExperts:
        parts = {role: change(part) for role, part in self.parts.items()}
        return PackedExperts(self.form, parts, dtype or self.dtype, self.is_turned)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Copy, pick and multiply packed; unpack for everything else."""
        if func is DEVICE:
            return args[0].parts["codes"].device
        kwargs = kwargs or {}
        if func in _COPIES:
            return _copied(func, *args, **kwargs)
        if func is torch.ops.aten.copy_.default and _alike(*args[:2]):
            for role, part in args[0].parts.items():
                part.copy_(args[1].parts[role])
            return args[0]
        known = PICKED.get(func) or _JOINED.get(func) or _GROUPED.get(str(func))
        result = known(*args, **kwargs) if known else NotImplemented
        if result is not NotImplemented:
            return result
        if writes(func, args, kwargs, PackedExperts):
            raise LayerError(
                f"{func} on experts in {_title_of(args, kwargs)}",
                "their values are packed, and what is written would be lost",
                "Load the base dequantized, outside packed_experts(), to change it",
            )
        args, kwargs = tree_map_only(PackedExperts, PackedExperts.unpacked, (tuple(args), kwargs))
        return func(*args, **kwargs)


_COPIES = {torch.ops.aten.detach.default, torch.ops.aten.clone.default}
_COPIES |= {torch.ops.aten.alias.default}
if (_to_copy := look_up("torch.ops.aten._to_copy")) is not None:
    _COPIES |= {_to_copy.default}


def _copied(func: Any, stack: PackedExperts, **kwargs: Any) -> PackedExperts:
    dtype = kwargs.pop("dtype", None)
    return stack._like(lambda t: func(t, **kwargs), dtype)


def _alike(one: Any, two: Any) -> bool:
    both = isinstance(one, PackedExperts) and isinstance(two, PackedExperts)
    return both and one.shape == two.shape and _as(one) == _as(two)


def _as(stack: PackedExperts) -> tuple[StackFormat, bool]:
    return stack.form, stack.is_turned


def _title_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    leaves = tree_leaves((tuple(args), dict(kwargs)))
    return next(leaf.form.title for leaf in leaves if isinstance(leaf, PackedExperts))


def _stacked(matrices: Sequence[Any], dim: int = 0) -> Any:
    """`torch.stack` of matrices of one format."""
    first = matrices[0]
    alike = all(_alike(first, matrix) for matrix in matrices)
    if not alike or dim != 0 or first.is_stack:
        return NotImplemented
    return _with_parts(matrices, torch.stack)


def _joined(stacks: Sequence[Any], dim: int = 0) -> Any:
    """`torch.cat` along the outputs, where no block of scales is cut."""
    first = stacks[0]
    packed = all(isinstance(stack, PackedExperts) for stack in stacks)
    if not packed or any(_as(stack) != _as(first) for stack in stacks):
        return NotImplemented
    outputs = first.dim() - (2 if first.is_turned else 1)
    if dim % first.dim() != outputs:
        return NotImplemented
    block = max(first.form.rows_of.values())
    if any(stack.shape[outputs] % block for stack in stacks[:-1]):
        return NotImplemented
    return _with_parts(stacks, lambda parts: torch.cat(parts, dim=-2))


def _with_parts(
    stacks: Sequence[PackedExperts], join: Callable[[list[Tensor]], Tensor]
) -> PackedExperts:
    first = stacks[0]
    parts = {role: join([stack.parts[role] for stack in stacks]) for role in first.parts}
    return PackedExperts(first.form, parts, first.dtype, first.is_turned)


_JOINED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.stack.default: _stacked,
    torch.ops.aten.cat.default: _joined,
}


def _product(x: Tensor, stack: Any, offs: Any = None, bias: Any = None, out: Any = None) -> Any:
    """`torch._grouped_mm` of rows that are sorted by expert.

    The host has to wait for their numbers, as in transformers' fallback: an expert without rows is
    not unpacked.
    """
    packed = isinstance(stack, PackedExperts) and stack.dim() == 3 and x.dim() == 2
    if not packed or offs is None or bias is not None or out is not None:
        return NotImplemented
    y, start = x.new_zeros(len(x), stack.shape[2]), 0
    for i, end in enumerate(offs.tolist()):
        if start < end:
            torch.mm(x[start:end], stack.part(i).unpacked(), out=y[start:end])
        start = end
    return y


def _backward(x: Tensor, stack: Any, offs: Tensor, g: Tensor) -> Any:
    """Of transformers' operation, which wants a gradient of the frozen stack, too."""
    del x
    return _product(g, stack.turned(), offs), g.new_zeros(()).expand(stack.shape)


# By name: custom operations exist once their library is imported.
_GROUPED: dict[str, Callable[..., Any]] = {
    "aten._grouped_mm.default": _product,
    "transformers.grouped_mm_fallback.default": _product,
    "transformers.grouped_mm_fallback_backward.default": _backward,
}
