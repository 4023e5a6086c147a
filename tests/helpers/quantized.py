"""Quantized weights from known values: float8 by blocks, and layers of bitsandbytes."""

from typing import Any

import torch
from helpers.packages import imported
from torch import Tensor, nn

N = 64  # the smallest block of the 4-bit formats
Block = tuple[int, int]


def quantized(w: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Quantize by blocks as DeepSeek's checkpoints are; returns the codes and the scales."""
    rows, cols = (-(-size // b) for size, b in zip(w.shape, block, strict=True))
    values, scales = torch.empty_like(w), torch.empty(rows, cols)
    for i in range(rows):
        for j in range(cols):
            at = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = w[at].abs().max() / 448
            values[at] = w[at] / scales[i, j]
    return values.to(torch.float8_e4m3fn), scales


def dequantized(q: Tensor, scales: Tensor, block: Block) -> Tensor:
    full = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return q.float() * full[: q.shape[0], : q.shape[1]]


def plain_net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, 32)).to(dtype)


def bitsandbytes(cls: str, net: Any, **options: Any) -> nn.Module:
    """A plain net with its linear layers in a class of bitsandbytes."""
    make = getattr(imported("bitsandbytes").nn, cls)
    options = {"compute_dtype": torch.float32, **options} if cls == "Linear4bit" else options
    sizes = ((layer.in_features, layer.out_features) for layer in (net[0], net[2]))
    first, last = (make(*size, **options) for size in sizes)
    made = nn.Sequential(first, nn.Tanh(), last)
    made.to(net[0].weight.dtype).load_state_dict(net.state_dict())
    return made.to("cpu")  # this is what quantizes
