"""Dropout on the input of A without a mask that waits for the backward.

One idea: what is dropped is a set of positions. Drawing the gaps between them costs a draw for each
dropped element, where a mask costs one for each element: at p = 0.05 ten times less. The gaps of
independent draws are geometric, so the positions have exactly the distribution of a Bernoulli mask.

The draw hangs on one seed from the global CPU generator, which activation checkpointing saves and
restores, so a recomputed forward drops the same elements. Few positions are kept for the backward,
as the gaps between them, of which nearly all fit into a byte: at p = 0.05 that is 0.4 bits for each
element of x. Many are drawn again from the seed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Drop", "draw_seed", "drop_", "dropped", "packed", "unpacked"]

# Above this, gaps would take more memory than a mask of bits, and positions are drawn again.
KEEP_UP_TO = 0.125


class Drop(NamedTuple):
    """What one dropout dropped.

    Attributes:
        p: Probability of dropping an element.
        seed: What its positions are drawn from.
    """

    p: float
    seed: int


def draw_seed(p: float) -> Drop:
    """Draw the seed of a dropout from the global CPU generator."""
    return Drop(p, int(torch.randint(2**62, ()).item()))


def dropped(drop: Drop, like: Tensor) -> Tensor:
    """Return the flat positions of `like` that are dropped, ascending int64.

    Args:
        drop: The dropout.
        like: A tensor of the shape and device of the input.

    Returns:
        `(n,)`; every element is there with probability `p`, independently.
    """
    n = like.numel()
    generator = torch.Generator(like.device).manual_seed(drop.seed)
    expected = n * drop.p
    draws = int(expected + 6 * math.sqrt(expected) + 16)
    found: list[Tensor] = []
    start = 0.0
    while start < n:
        gaps = torch.empty(draws, device=like.device, dtype=torch.float64)
        gaps = gaps.uniform_(generator=generator).log_().mul_(1 / math.log1p(-drop.p)).floor_()
        positions = gaps.add_(1).cumsum_(0).add_(start - 1 if not found else start)
        found.append(positions)
        start = float(positions[-1])
    positions = torch.cat(found) if len(found) > 1 else found[0]
    return positions[: int(torch.searchsorted(positions, float(n)))].to(torch.int64)


def packed(positions: Tensor) -> Tensor:
    """Return ascending positions as the gaps between them, in the smallest dtype that holds them.

    Args:
        positions: `(n,)`, int64, ascending.

    Returns:
        `(n,)`, uint8 or a wider integer dtype.

    Example:
        >>> packed(torch.tensor([2, 3, 9]))
        tensor([3, 1, 6], dtype=torch.uint8)
    """
    gaps = positions.diff(prepend=positions.new_full((1,), -1))
    largest = int(gaps.max()) if len(gaps) else 0
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if largest <= torch.iinfo(dtype).max:
            return gaps.to(dtype)
    return gaps


def unpacked(gaps: Tensor) -> Tensor:
    """Return the positions that `packed` took apart, int64.

    Example:
        >>> unpacked(packed(torch.tensor([2, 3, 9])))
        tensor([2, 3, 9])
    """
    return gaps.cumsum(0, dtype=torch.int64).sub_(1)


def drop_(x: Tensor, positions: Tensor) -> Tensor:
    """Set the elements of a contiguous x at flat positions to zero, in place."""
    x.view(-1).index_fill_(0, positions, 0.0)
    return x
