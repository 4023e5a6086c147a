"""What the codes and scales of packed weights mean as floats: MXFP4, float8, codes of 4 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mxfp4_values(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the values of MXFP4: codes of 4 bits, a power of two for each 32 of them (GPT-OSS).

    Source: the OCP Microscaling formats, version 1.0.

    Args:
        codes: uint8 `(..., out, in / 2)`.
        scales: uint8 `(..., out, in / 32)`, exponents of 2 plus 127.

    Returns:
        float32 `(..., out, in)`.

    Examples:
        >>> codes, scales = torch.full((1, 16), 0x21), torch.full((1, 1), 128)
        >>> mxfp4_values(codes.byte(), scales.byte())[0, :4].tolist()
        [1.0, 2.0, 1.0, 2.0]
    """
    values = float4_values(codes).view(*scales.shape, -1)
    return torch.ldexp(values, scales.int().unsqueeze(-1) - 127).flatten(-2)


def float8_values(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the values of float8: codes times the scale of their block (DeepSeek-V3, Qwen3-FP8).

    Args:
        codes: e4m3 `(out, in)`.
        scales: Of any float dtype, one for each block; the blocks at the edges are smaller.
        block: Rows and columns of a block.

    Returns:
        float32 `(out, in)`.

    Examples:
        >>> codes = torch.ones(2, 3).to(torch.float8_e4m3fn)
        >>> float8_values(codes, torch.tensor([[2.0, 5.0]]), (2, 2)).tolist()
        [[2.0, 2.0, 5.0], [2.0, 2.0, 5.0]]
    """
    (high, wide), values = block, codes.float()
    scales = scales.float().repeat_interleave(high, -2)[..., : values.shape[-2], :]
    full = values.shape[-1] // wide  # whole blocks, whose scales are not copied to each value
    blocks = values[..., : full * wide].view(*values.shape[:-1], full, wide)
    blocks.mul_(scales[..., :full, None])
    values[..., full * wide :].mul_(scales[..., full:])
    return values


def float4_values(codes: Tensor) -> Tensor:
    """Return what codes of 4 bits (e2m1) mean, two to a byte, the lower half first.

    Args:
        codes: uint8 `(..., n / 2)`.

    Returns:
        float32 `(..., n)`.

    Examples:
        >>> float4_values(torch.tensor([0x21, 0xF7], dtype=torch.uint8)).tolist()
        [0.5, 1.0, 6.0, -6.0]
    """
    # Formed on the device: a table of Python numbers would be sent there for each product.
    pairs = torch.arange(256, device=codes.device)
    four = torch.stack([pairs & 15, pairs >> 4], dim=1)
    exponent, half = four >> 1 & 3, (four & 1) / 2
    size = torch.where(exponent > 0, torch.ldexp(1 + half, exponent - 1), half)
    table = torch.where(four < 8, size, -size)
    return F.embedding(codes.int(), table).flatten(-2)
