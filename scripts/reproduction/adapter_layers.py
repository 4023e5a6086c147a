"""Adapter layers, the paper's main rival: small bottlenecks in series with the layers.

An adapter layer computes `x + U f(D x + d) + u` with `D: (width, dim)` and
`U: (dim, width)`, U and u zero at the start, so the model starts as it was. Written here because
no kept library of adapter layers runs with transformers 5 (`adapters` 1.3 asks for 4.57).

- `H`, Houlsby et al. 2019: one after attention and one after the MLP, before each is added to the
  residual stream; the layers' own LayerNorms train as well.
- `L`, Lin et al. 2020: one after the MLP only, with a LayerNorm of its own in front.

The paper counts (section 5.1) `n_layers * (2 dim width + width + dim) + 2 n_norms dim`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Bottleneck(nn.Module):
    """One adapter layer.

    Args:
        dim: Width of the stream it sits in.
        width: Width of the bottleneck.
        normed: Whether it has a LayerNorm in front.
    """

    def __init__(self, dim: int, width: int, *, normed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim) if normed else nn.Identity()
        self.down = nn.Linear(dim, width)
        self.up = nn.Linear(width, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Compute `x + up(gelu(down(norm(x))))`; x is (..., dim)."""
        return x + self.up(nn.functional.gelu(self.down(self.norm(x))))


def attach(model: nn.Module, names: Sequence[str], dim: int, width: int, *, normed: bool) -> None:
    """Put an adapter layer behind each named layer, and freeze all else.

    Args:
        model: Changed in place; the layer becomes the first of two in a `Sequential`.
        names: Dotted names of layers whose output is (..., dim).
        dim: Width of the stream.
        width: Width of the bottlenecks.
        normed: Whether each has a LayerNorm in front.
    """
    model.requires_grad_(False)
    for name in names:
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        layer = Bottleneck(dim, width, normed=normed)
        setattr(owner, last, nn.Sequential(getattr(owner, last), layer))


def count(n_layers: int, dim: int, width: int, n_norms: int) -> int:
    """The paper's count of trainable parameters."""
    return n_layers * (2 * dim * width + width + dim) + 2 * n_norms * dim


def trainable(model: nn.Module) -> int:
    """How many parameters train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
