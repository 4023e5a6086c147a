"""The formats in which experts are published: what their codes and scales mean as floats.

A format knows matrices `(..., out, in)` by their parts. Every part has the leading dimensions of
the stack, and in its last but one dimension an entry for so many rows (`rows_of`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.errors import LayerError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Parts = Mapping[str, Tensor]


class StackFormat(ABC):
    """A format of matrices; two are equal if their codes mean the same."""

    title: ClassVar[str]
    """What messages call it."""

    is_written_on_disk: ClassVar[bool] = True
    """Whether a merge on disk can write it."""

    @property
    @abstractmethod
    def rows_of(self) -> Mapping[str, int]:
        """The parts, each with the number of rows that one of its entries is for."""

    @abstractmethod
    def n_in(self, parts: Parts) -> int:
        """Return the number of columns."""

    @abstractmethod
    def values(self, parts: Parts) -> Tensor:
        """Return the values, float32 `(..., out, in)`."""


@dataclass(frozen=True)
class Mxfp4Stack(StackFormat):
    """MXFP4: codes of 4 bits, a power of two for each 32 of them (GPT-OSS).

    Parts: `codes` uint8 `(..., out, in / 2)`; `scales` uint8 `(..., out, in / 32)`, exponents of 2
    plus 127. Source: the OCP Microscaling formats, version 1.0.
    """

    title: ClassVar[str] = "MXFP4"
    is_written_on_disk: ClassVar[bool] = False

    @property
    def rows_of(self) -> Mapping[str, int]:  # noqa: D102
        return {"codes": 1, "scales": 1}

    def n_in(self, parts: Parts) -> int:  # noqa: D102
        return 2 * parts["codes"].shape[-1]

    def values(self, parts: Parts) -> Tensor:  # noqa: D102
        scales = parts["scales"]
        values = float4_values(parts["codes"]).view(*scales.shape, -1)
        return torch.ldexp(values, scales.int().unsqueeze(-1) - 127).flatten(-2)


@dataclass(frozen=True)
class Float8Stack(StackFormat):
    """Float8 (e4m3) times the scale of its block (DeepSeek-V3, Qwen3-FP8, GLM).

    Parts: `codes` `(..., out, in)`; `scales` of any float dtype, one for each block, those at the
    edges smaller.
    """

    block: tuple[int, int]
    title: ClassVar[str] = "float8"

    @property
    def rows_of(self) -> Mapping[str, int]:  # noqa: D102
        return {"codes": 1, "scales": self.block[0]}

    def n_in(self, parts: Parts) -> int:  # noqa: D102
        return parts["codes"].shape[-1]

    def values(self, parts: Parts) -> Tensor:  # noqa: D102
        (high, wide), values = self.block, parts["codes"].float()
        scales = parts["scales"].float().repeat_interleave(high, -2)[..., : values.shape[-2], :]
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


def read_matrix(
    tensors: Mapping[str, Tensor], block: tuple[int, int] | None, asked: str
) -> tuple[StackFormat, dict[str, Tensor]] | None:
    """Return the format and the parts of a matrix, by what a checkpoint stores of a linear layer.

    Args:
        tensors: `weight` with the scales beside it, as transformers' fp8 names them.
        block: Block of float8 that the config says; None for one scale of all.
        asked: For messages.

    Returns:
        None for a plain weight.

    Raises:
        LayerError: It is quantized in another way.
    """
    codes, scales = tensors["weight"], tensors.get("weight_scale_inv")
    if scales is None and codes.dtype in (*_FLOATS, torch.float64):
        return None
    if scales is not None and codes.dim() == 2 and scales.is_floating_point():
        high, wide = block or codes.shape
        grid = (-(-len(codes) // high), -(-codes.shape[1] // wide))
        if codes.dtype == torch.float8_e4m3fn and scales.numel() == math.prod(grid):
            parts = {"codes": codes, "scales": scales.reshape(grid)}
            return Float8Stack((high, wide)), parts
    kinds = ", ".join(f"{name} {t.dtype} {list(t.shape)}" for name, t in tensors.items())
    raise LayerError(
        asked,
        f"it is stored as {kinds}",
        "Experts stay packed in MXFP4 as of GPT-OSS, or in float8; load others dequantized",
    )
