"""One adapter for each row of a batch that a convolution gets.

The update of a convolution is a convolution with A, which has a few channels, and then a product
with B. The rows are groups of one convolution, each with the A of its adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from lora_inject.functional.factors import Factors, compute_dtype, without_autocast
from lora_inject.functional.routed import bank


def routed_convolution(
    y: Tensor,
    x: Tensor,
    places: Tensor,
    adapters: Sequence[Sequence[Factors]],
    convolve: Callable[[Tensor, Tensor, int], Tensor],
    weight_shape: Sequence[int],
    *,
    float32: bool,
) -> Tensor:
    """Add to each row of a batch the update of its own adapter.

    Args:
        y: `(batch, out, *positions)`, the layer's own output; never modified.
        x: `(batch, in, *size)`.
        places: `(batch,)`, int64: 0 for the base, else 1 + the index of the row's adapter.
        adapters: The updates of each adapter.
        convolve: Called with an input, a weight and a number of groups: the layer's convolution
            with its stride, padding and dilation, without a bias.
        weight_shape: `(out, in / groups, *kernel)`, of the layer.
        float32: Keep the arithmetic in float32 over a 16-bit base.

    Returns:
        `(batch, out, *positions)`, in the dtype of `y`. Rows of the base keep their bits.

    Examples:
        >>> A, B, W = torch.randn(2, 9), torch.randn(5, 2), torch.randn(5, 3, 3)
        >>> x, conv = torch.randn(2, 3, 7), torch.nn.functional.conv1d
        >>> by_groups = lambda x, w, groups: conv(x, w, groups=groups)
        >>> places, adapters = torch.tensor([1, 0]), [[Factors(A, B, 0.5)]]
        >>> y = routed_convolution(
        ...     conv(x, W), x, places, adapters, by_groups, W.shape, float32=False
        ... )
        >>> torch.allclose(y[0], conv(x[0], W + 0.5 * (B @ A).view(5, 3, 3)), atol=1e-5)
        True
    """
    with without_autocast(y) or nullcontext():
        A_bank, B_bank = bank(adapters, weight_shape[0], compute_dtype(y.dtype, float32), base=True)
        batch, groups, rank = len(x), x.shape[1] // weight_shape[1], A_bank.shape[1]
        kernels = A_bank.index_select(0, places).view(batch, 1, rank, *weight_shape[1:])
        kernels = kernels.expand(-1, groups, *[-1] * (kernels.dim() - 2)).flatten(0, 2)
        h = convolve(x.to(kernels.dtype).flatten(0, 1)[None], kernels, batch * groups)
        B = B_bank.index_select(0, places).view(batch, groups, -1, rank)
        update = (B @ h.view(batch, groups, rank, -1)).view(y.shape)
        mine = (places > 0).view(-1, *[1] * (y.dim() - 1))
        return torch.where(mine, (y.to(update.dtype) + update).to(y.dtype), y)
