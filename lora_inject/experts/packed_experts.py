"""Stacked experts in MXFP4, of which each is unpacked where it is used, and never all of them.

The tensor has the shape and dtype of the stack and the memory of its 4-bit codes. Selected or
transposed it stays packed. A product unpacks its matrices one by one, and its backward again,
because autograd saves the codes. Any other operation unpacks what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_inject.core.functional.picking import PICKED, writes
from lora_inject.core.functional.unstored import DEVICE, unstored
from lora_inject.errors import LayerError
from lora_inject.private import look_up, needed
from lora_inject.trees import tree_map_only


def unpacked_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """Unpack values of 4 bits: codes `(..., n / 2)`, two to a byte; powers of two `(..., n / 32)`.

    Returns float32 `(..., n)`. Source: the OCP Microscaling formats, version 1.0.
    """
    # Formed on the device: a table of Python numbers would be sent there for each product.
    pairs = torch.arange(256, device=codes.device)
    four = torch.stack([pairs & 15, pairs >> 4], dim=1)
    exponent, half = four >> 1 & 3, (four & 1) / 2
    size = torch.where(exponent > 0, torch.ldexp(1 + half, exponent - 1), half)
    table = torch.where(four < 8, size, -size)
    values = F.embedding(codes.int(), table).view(*scales.shape, -1)
    return torch.ldexp(values, scales.int().unsqueeze(-1) - 127).flatten(-2)


class PackedExperts(Tensor):
    """A stack of matrices `(E, in, out)`, or one matrix of it, with codes `(..., out, in / 2)`.

    Args:
        codes: uint8 `(..., out, in / 2)`.
        scales: uint8 `(..., out, in / 32)`, exponents of 2 plus 127.
        dtype: Dtype of the values.
        is_turned: Whether the matrices are transposed, `(..., out, in)`.

    Examples:
        >>> codes, scales = torch.full((2, 3, 16), 0x21), torch.full((2, 3, 1), 128)
        >>> stack = PackedExperts(codes.byte(), scales.byte(), torch.float32)
        >>> stack.shape, (torch.ones(1, 32) @ stack[0]).tolist()
        (torch.Size([2, 32, 3]), [[48.0, 48.0, 48.0]])
    """

    reads_as_sum: ClassVar[bool] = True  # core.functional.weight asks
    codes: Tensor
    scales: Tensor
    is_turned: bool

    @staticmethod
    def __new__(
        cls: type[PackedExperts],
        codes: Tensor,
        scales: Tensor,
        dtype: torch.dtype,
        is_turned: bool = False,
    ) -> PackedExperts:
        """Make a tensor without memory of its own."""
        *lead, n_out, n_bytes = codes.shape
        size, stride = [*lead, n_out, 2 * n_bytes], [2 * n_bytes, 1]
        stride = [n_out * 2 * n_bytes] * len(lead) + stride
        if not is_turned:
            size, stride = ([*t[:-2], t[-1], t[-2]] for t in (size, stride))
        needed("torch.Tensor._make_wrapper_subclass", "experts that stay packed")
        made: PackedExperts = unstored(cls, size, stride, dtype=dtype, device=codes.device)
        made.codes, made.scales, made.is_turned = codes, scales, is_turned
        return made

    __torch_function__ = nn.Parameter.__torch_function__  # none of its own

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        """Return what torch moves and swaps."""
        return ["codes", "scales"], {"dtype": self.dtype, "is_turned": self.is_turned}

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], settings: dict[str, Any], size: Any, stride: Any
    ) -> PackedExperts:
        """Make it from what `__tensor_flatten__` returns."""
        del size, stride
        return PackedExperts(inner["codes"], inner["scales"], **settings)

    def __repr__(self) -> str:  # type: ignore[override]
        """Return shape and dtype; a print unpacks nothing."""
        return f"PackedExperts({tuple(self.shape)}, {self.dtype}, {self.device})"

    def dequantize(self) -> Tensor:
        """Return the values, a new contiguous tensor."""
        return self.unpacked().contiguous()

    def unpacked(self) -> Tensor:
        """Return the values, a new tensor with the strides of this one."""
        values = unpacked_mxfp4(self.codes, self.scales).to(self.dtype)
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
        return PackedExperts(self.codes, self.scales, self.dtype, not self.is_turned)

    def _like(
        self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None
    ) -> PackedExperts:
        codes, scales = change(self.codes), change(self.scales)
        return PackedExperts(codes, scales, dtype or self.dtype, self.is_turned)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Copy, pick and multiply packed; unpack for everything else."""
        if func is DEVICE:
            return args[0].codes.device
        kwargs = kwargs or {}
        if func in _COPIES:
            return _copied(func, *args, **kwargs)
        if func is torch.ops.aten.copy_.default and _alike(*args[:2]):
            args[0].codes.copy_(args[1].codes)
            args[0].scales.copy_(args[1].scales)
            return args[0]
        known = PICKED.get(func) or _GROUPED.get(str(func))
        result = known(*args, **kwargs) if known else NotImplemented
        if result is not NotImplemented:
            return result
        if writes(func, args, kwargs, PackedExperts):
            raise LayerError(
                f"{func} on experts in MXFP4",
                "their values are packed, and what is written would be lost",
                "Load the base with Mxfp4Config(dequantize=True) to change it",
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
    return both and one.shape == two.shape and one.is_turned == two.is_turned


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
