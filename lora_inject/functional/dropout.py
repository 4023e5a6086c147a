"""Dropout on the input of A without a mask that waits for the backward.

What is dropped is a set of positions. Drawing the gaps between them costs a draw for each
dropped element, where a mask costs one for each element: at p = 0.05 ten times less. The gaps of
independent draws are geometric, so the positions have the distribution of a Bernoulli mask, but for
gaps that one draw in 30 million would have made longer.

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

# Above this, gaps would take more memory than a mask of bits, and positions are drawn again.
KEEP_UP_TO = 0.125
_LEAST = 2.0**-25
"""Least uniform number, below all others of 24 bits: zero would be a gap without an end."""


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


def dropped(drop: Drop, like: Tensor) -> tuple[Tensor, Tensor]:
    """Draw which elements of `like` are dropped; each is with probability `p`, independently.

    Args:
        drop: The dropout.
        like: A tensor of the shape and device of the input.

    Returns:
        Their flat positions, `(n,)`, ascending int64, and the gaps between them, `(n,)`, integers
        of which `unpacked` makes the positions again.
    """
    n = like.numel()
    generator = torch.Generator(like.device).manual_seed(drop.seed)
    expected = n * drop.p
    draws = int(expected + 6 * math.sqrt(expected) + 16)
    found: list[Tensor] = []
    end = 0
    while not found or end < n:
        found.append(_gaps(drop.p, draws, generator))
        positions = unpacked(found[0] if len(found) == 1 else torch.cat(found))
        end = int(positions[-1]) + 1
    n_dropped = int(torch.searchsorted(positions, n))
    gaps = found[0] if len(found) == 1 else torch.cat(found)
    return positions[:n_dropped], gaps[:n_dropped]


def _gaps(p: float, n: int, generator: torch.Generator) -> Tensor:
    """Draw the distances from one dropped element to the next: 1, 2, ..., geometric.

    Args:
        p: Probability of dropping an element.
        n: How many.
        generator: What they are drawn from.

    Returns:
        `(n,)`, int32, or int64 for a small p.
    """
    # Uniform numbers of 24 bits tell gaps apart as long as one of them is not worth an element.
    draws, gaps = (torch.float32, torch.int32) if p > 2**-12 else (torch.float64, torch.int64)
    uniform = torch.empty(n, device=generator.device, dtype=draws)
    uniform.uniform_(_LEAST, 1, generator=generator)
    return uniform.log_().mul_(1 / math.log1p(-p)).to(gaps).add_(1)


def packed(gaps: Tensor) -> Tensor:
    """Return gaps in the smallest dtype that holds them.

    Args:
        gaps: `(n,)`, positive integers.

    Returns:
        `(n,)`, uint8 or a wider integer dtype.

    Example:
        >>> packed(torch.tensor([3, 1, 6]))
        tensor([3, 1, 6], dtype=torch.uint8)
    """
    largest = int(gaps.max()) if len(gaps) else 0
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if largest <= torch.iinfo(dtype).max:
            return gaps.to(dtype)
    return gaps


def unpacked(gaps: Tensor) -> Tensor:
    """Return the positions that gaps lead to, int64.

    Example:
        >>> unpacked(torch.tensor([3, 1, 6]))
        tensor([2, 3, 9])
    """
    return gaps.cumsum(0, dtype=torch.int64).sub_(1)


def drop_(x: Tensor, positions: Tensor) -> Tensor:
    """Set the elements of a contiguous x at flat positions to zero, in place."""
    x.view(-1).index_fill_(0, positions, 0.0)
    return x
