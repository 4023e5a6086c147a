"""Products of stacked experts whose rows are sorted by expert: one call for all of them.

A stack that is read as W + delta is lazy (`core.functional.lazy`), and such a call stays thin: the
base's product, and two more with the factors of each update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.core.functional.lazy import PLAIN, LazyWeight
from lora_inject.core.functional.weight import LowRank
from lora_inject.private import look_up

# Those of them that this torch has; the first is the one that is called.
_GROUPED_MM = [
    function
    for function in (look_up("torch._grouped_mm"), getattr(F, "grouped_mm", None))
    if function is not None
]


def product(function: Any) -> Callable[..., Any] | None:
    """Return what a function of torch is for a lazy stack; None if it is no such product."""
    return _PRODUCTS.get(function) or _BY_NAME.get(str(function))


def _grouped_mm(
    x: Tensor, weight: Any, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    plain = bias is None and out_dtype is None
    multiply = _GROUPED_MM[0]
    return _grouped(multiply, x, weight, offs) if plain else NotImplemented


def _grouped_fallback(x: Tensor, weight: Any, offs: Tensor) -> Any:
    """`transformers.integrations.moe`: the replacement for `torch._grouped_mm`."""
    return _grouped(torch.ops.transformers.grouped_mm_fallback, x, weight, offs)


def _grouped(multiply: Callable[..., Tensor], x: Tensor, weight: Any, offs: Tensor | None) -> Any:
    thin = type(x) in PLAIN and isinstance(weight, LazyWeight) and x.dtype == weight.dtype
    if not thin or offs is None or x.dim() != 2 or weight.dim() != 3:
        return NotImplemented
    return grouped_product(weight.value(), multiply, x, offs)


def grouped_product(
    stack: LowRank, multiply: Callable[..., Tensor], x: Tensor, offs: Tensor
) -> Tensor:
    """Return the product of groups of rows, each with a matrix of its own.

    `multiply` is called as `torch._grouped_mm` is: x `(rows, m)`, sorted by group, a stack of
    matrices, and the end of each group. Rows behind the last are what it leaves there.
    """
    y = multiply(x, stack.base, offs=offs[stack.repeat - 1 :: stack.repeat].contiguous())
    for left, right, scale in stack.terms:
        # The kernels need rows of a multiple of 16 bytes, which a small rank does not give.
        missing = -left.shape[-1] % max(1, 16 // y.element_size())
        h = _factor_product(multiply, x, left, (0, missing), offs)
        update = _factor_product(multiply, h, right, (0, 0, 0, missing), offs)
        y = torch.add(y, update, alpha=scale)
    return y


def _factor_product(
    multiply: Callable[..., Tensor],
    x: Tensor,
    stack: Tensor,
    padding: tuple[int, ...],
    offs: Tensor,
) -> Tensor:
    """Return the product with a factor of each group, or with the one that all groups share."""
    is_one = len(stack) > 1 and stack.stride(0) == 0
    stack = F.pad(stack[:1] if is_one else stack, padding).to(x.dtype)
    return torch.matmul(x, stack[0]) if is_one else multiply(x, stack, offs=offs)


_PRODUCTS = dict.fromkeys(_GROUPED_MM, _grouped_mm)
# Custom operations, which exist once their library is imported.
_BY_NAME = {"transformers.grouped_mm_fallback": _grouped_fallback}
