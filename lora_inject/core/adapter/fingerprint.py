"""Recognize the base of an adapter among others of the same shape, by a few of its values.

Sixteen values at evenly spaced places of each parameter identify the base. They are compared to the
precision of bfloat16, so the same base in another dtype passes and another base does not. Tensors
that the adapter does not touch are sampled as well: it was trained with them. Of a quantized
adapted weight the class, the settings and a few packed bytes are compared. Whole tensors of the
base that an adapter carries are compared as such.

An embedding's adapter changes the rows of the tokens that it has seen, and evenly spaced places
would miss them: its own merged base would pass. So values that moved are sampled too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

N_SAMPLES = 16


class Moved(NamedTuple):
    """Values of a weight at some flat positions."""

    positions: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Fingerprint:
    """Values of a base's parameters, to recognize another base of the same shape.

    Attributes:
        shapes: Shape of each sampled parameter, by its name in the state dict.
        samples: A few values of each, float32, taken at evenly spaced flat positions.
        quantized: A description of each adapted weight that is not a plain floating point tensor
            and so has no samples: class, format, block size and a few packed bytes; empty for
            sharded tensors and those on the meta device.
        moved: Flat positions and values where an adapter changes a weight that it leaves alone
            elsewhere, such as rows of an embedding.
    """

    shapes: Mapping[str, tuple[int, ...]]
    samples: Mapping[str, tuple[float, ...]]
    quantized: Mapping[str, str] = field(default_factory=dict)
    moved: Mapping[str, Moved] = field(default_factory=dict)

    def without(self, names: Collection[str]) -> Fingerprint | None:
        """Return the fingerprint without some weights, None if no weight is left."""
        kept = [{k: v for k, v in each.items() if k not in names} for each in self.parts]
        return Fingerprint(*kept) if kept[0] else None

    @property
    def parts(self) -> tuple[Mapping[str, Any], ...]:
        """All that it says, each by the names of weights."""
        return self.shapes, self.samples, self.quantized, self.moved


def sample_positions(shape: tuple[int, ...], n: int = N_SAMPLES) -> tuple[int, ...]:
    """Flat positions of the values that are compared: `n` evenly spaced ones, or all there are.

    The last part has none: rows that were added to a vocabulary lie there, and they have other
    values in each process.

    Examples:
        >>> sample_positions((2, 2)), sample_positions((10, 10), n=4)
        ((0, 1, 2, 3), (0, 24, 49, 74))
    """
    numel = math.prod(shape)
    if numel <= n:
        return tuple(range(numel))
    return tuple(i * (numel - 1) // n for i in range(n))


def samples(weights: Mapping[str, Tensor]) -> dict[str, tuple[float, ...]]:
    """Return values of plain floating point tensors at their `sample_positions`, as float32.

    Equal shapes are sampled together, in one transfer from a GPU.
    """
    alike: dict[object, list[str]] = {}
    for name, weight in weights.items():
        alike.setdefault((weight.shape, weight.dtype, weight.device), []).append(name)
    values_of: dict[str, tuple[float, ...]] = dict.fromkeys(weights, ())
    for names in alike.values():
        first = weights[names[0]]
        positions = sample_index(tuple(first.shape)).to(first.device)
        with torch.no_grad():
            values = torch.stack([weights[name].take(positions) for name in names])
        values_of.update(zip(names, map(tuple, values.float().tolist()), strict=True))
    return values_of


def values_at(weight: Tensor, positions: tuple[int, ...]) -> tuple[float, ...]:
    """Return values of a plain floating point tensor at flat positions, as float32."""
    at = torch.tensor(positions, dtype=torch.long, device=weight.device)
    return tuple(weight.detach().take(at).float().tolist())


@lru_cache(maxsize=256)
def sample_index(shape: tuple[int, ...]) -> Tensor:
    """The positions as a tensor; a model has few shapes and many weights."""
    return torch.tensor(sample_positions(shape), dtype=torch.long, device="cpu")
