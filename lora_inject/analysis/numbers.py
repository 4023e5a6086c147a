"""The low-rank blocks of a site: their names, and the singular values of each.

Whatever a site is, its delta is a few products `left @ right` of `(out, k)` and `(k, in)`. All
figures of a delta come from its thin factors, so no matrix of the size of W is formed. The frozen
start of pissa and olora is `k` more columns with the opposite sign.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_inject.algebra.svd import ThinProduct
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.functional.factors import Patch
from lora_inject.core.spec.sites import Block, SiteSpec
from lora_inject.core.spec.tables import Figures, kind_of
from lora_inject.core.spec.variants import VARIANTS
from lora_inject.errors import StateError

SHARES = (0.90, 0.95, 0.99)
"""Shares of the energy for which the needed rank is stated."""


@dataclass(frozen=True)
class Place(Figures):
    """Where in a model a block lies, read from its names.

    Models repeat their layers, and the names repeat with a number that counts. The name with its
    numbers replaced is the kind, the numbers are the position. The number of an expert is neither.

    Attributes:
        site: Name of the site.
        label: Slice and expert (`q`, `expert 3`, `expert 3 q`); empty for a plain site.

    Examples:
        >>> place = Place("h.3.attn.c_attn", "q")
        >>> place.name, place.kind, place.position
        ('h.3.attn.c_attn [q]', 'h.*.attn.c_attn [q]', (3,))
        >>> Place("layers.2.experts.7.w1", "").position, Place("h.2.up", "expert 7 q").kind
        ((2,), 'h.*.up [q]')
    """

    site: str
    label: str

    @property
    def name(self) -> str:
        """Site and label in one."""
        return f"{self.site} [{self.label}]" if self.label else self.site

    @property
    def kind(self) -> str:
        """The name with `*` for each number, without the expert."""
        return kind_of(self.name).replace("[expert * ", "[").replace(" [expert *]", "")

    @property
    def position(self) -> tuple[int, ...]:
        """The numbers, such as `(3,)` for layer 3; empty where there are none."""
        parts = self.site.split(".")
        before = ["", *parts]
        return tuple(int(part) for part, parent in zip(parts, before, strict=False)
                     if part.isdecimal() and parent != "experts")  # fmt: skip

    @property
    def at(self) -> str:
        """The position as text: `3`, `1.0`, or `-`."""
        return ".".join(map(str, self.position)) or "-"


@dataclass(frozen=True)
class SiteBlock(Place):
    """One low-rank block of a site: an adapted slice, an expert, or all of a plain site."""

    block: Block  # where it lies on the weight matrix
    A: Tensor  # `(rank, in)`, as stored
    B: Tensor  # `(out, rank)`, as stored
    delta: ThinProduct  # `scale * B @ A`, less the frozen start

    @property
    def rank(self) -> int:
        """r, the rows of A."""
        return self.A.shape[0]


def site_blocks(site: SiteState, *, checked: bool = True) -> tuple[SiteBlock, ...]:
    """Split a site into its low-rank blocks, in the order of `SiteSpec.blocks`.

    Args:
        site: The site.
        checked: Refuse NaN and Inf, and DoRA, whose update is more than these blocks.

    Returns:
        One block for each adapted slice of each expert.

    Raises:
        StateError: A tensor holds NaN or Inf, or the update is not low-rank.

    Examples:
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> from lora_inject.core.spec.sites import Slices
        >>> spec = SiteSpec("qkv", "linear", 4, 6, (6, 4), rank=2, alpha=2,
        ...                 slices=Slices((("q", 2), ("k", 2), ("v", 2)), ("q", "v")))
        >>> [b.label for b in site_blocks(SiteState(spec, torch.ones(4, 4), torch.ones(4, 2)))]
        ['q', 'v']
    """
    terms = [Patch(site.spec, A, B, sign) for A, B, sign in site.pairs]
    if checked and not all(bool(torch.isfinite(t).all()) for t in site.tensors.values()):
        remedy = "Its training diverged; take an earlier checkpoint of the adapter"
        raise StateError(f"analyze '{site.spec.name}'", "it holds NaN or Inf", remedy)
    return blocks_of_terms(terms, checked=checked)


def blocks_of_terms(terms: Sequence[Patch], *, checked: bool = True) -> tuple[SiteBlock, ...]:
    """Split the terms of one weight: the update, less its frozen start if it has one."""
    spec = terms[0].spec
    if checked and VARIANTS[spec.variant].gained:
        problem = f"it is a DoRA adapter ({spec.variant}), whose update is not low-rank"
        remedy = "Merge it, and extract the difference as an adapter"
        raise StateError(f"analyze '{spec.name}'", problem, remedy)
    flat = [(_flat(t.A, spec.in_features), _flat(t.B, spec.rank), t.weight) for t in terms]
    made = []
    for block, label in zip(spec.blocks, _labels(spec), strict=True):
        parts = [(a[slice(*block.a)], b[slice(*block.b)], weight) for a, b, weight in flat]
        left = [spec.scale * weight * b.double() for _, b, weight in parts]
        delta = ThinProduct(torch.cat(left, 1), torch.cat([a.double() for a, _, _ in parts]))
        A, B, _ = parts[0]
        made.append(SiteBlock(spec.name, label, block, A, B, delta))
    return tuple(made)


def _labels(spec: SiteSpec) -> list[str]:
    """Return the names of a site's blocks in their order: by expert, then by slice."""
    slices = spec.slices.adapt if spec.slices else ("",)
    numbers = spec.only or range(spec.experts or 0)
    experts = [""] if spec.experts is None else [f"expert {e}" for e in numbers]
    return [f"{expert} {part}".strip() for expert in experts for part in slices]


def _flat(tensor: Tensor, width: int) -> Tensor:
    return tensor.detach().reshape(-1, width)


@dataclass(frozen=True)
class Spectrum(Figures):
    """Singular values of one delta.

    Attributes:
        values: `(n,)` float64, decreasing, with n the smallest of rank, out and in; values that
            are zero to float64 are zero.

    Examples:
        >>> s = Spectrum(torch.tensor([3.0, 1.0, 0.0]).double())
        >>> s.rank, round(s.stable_rank, 4), round(s.effective_rank, 4), s.rank_for(0.95)
        (2, 1.1111, 1.7548, 2)
    """

    values: Tensor

    @property
    def norm(self) -> float:
        """Frobenius norm of the delta."""
        return float(torch.linalg.vector_norm(self.values))

    @property
    def rank(self) -> int:
        """How many values are not zero."""
        return int(self.values.count_nonzero())

    @property
    def first_share(self) -> float:
        """Share of the energy in the first direction; 0 for no delta."""
        return float(self.energy[0]) if self.rank else 0.0

    @property
    def stable_rank(self) -> float:
        """`|D|_F^2 / |D|_2^2`: from 1 (one direction) to the rank (all equal); 0 for no delta."""
        return float(self._shares.sum() / self._shares[0]) if self.rank else 0.0

    @property
    def effective_rank(self) -> float:
        """`exp(H)`, H the entropy of `s / sum(s)`; 0 for no delta.

        Source: Roy and Vetterli, *The effective rank*, EUSIPCO 2007, definition 1.
        """
        if not self.rank:
            return 0.0
        p = self.values[: self.rank] / self.values.sum()
        return math.exp(float(-(p * p.log()).sum()))

    @property
    def energy(self) -> Tensor:
        """`(n,)`: share of the sum of squares that the first 1, 2, ... values hold."""
        return self._shares.cumsum(0)

    @property
    def needed(self) -> dict[str, int]:
        """The smallest rank that holds each share of `SHARES`."""
        return {f"{share:.0%}": self.rank_for(share) for share in SHARES}

    def rank_for(self, share: float) -> int:
        """Return the smallest rank that holds a share, in [0, 1], of the energy; 0 for no delta."""
        # Sums of float64 shares reach 1 only to a few units in the last place.
        enough = (self.energy >= share - 1e-12).nonzero()
        return int(enough[0]) + 1 if self.rank and len(enough) else 0

    @property
    def _shares(self) -> Tensor:
        # Divided first: squares of 1e-200 would vanish.
        first = float(self.values[0]) if self.rank else 1.0
        squares = (self.values / first).square()
        return squares / max(float(squares.sum()), 1.0)


def spectrum(delta: ThinProduct) -> Spectrum:
    """Return the singular values of a delta without forming it.

    Args:
        delta: Of a block, or `ThinProduct.of(A, B, scale)`.

    Returns:
        The spectrum, in float64.

    Examples:
        >>> A, B = torch.randn(2, 50), torch.randn(40, 2)
        >>> dense = torch.linalg.svdvals(3.0 * B.double() @ A.double())[:2]
        >>> torch.allclose(spectrum(ThinProduct.of(A, B, 3.0)).values, dense)
        True
    """
    _, S, _ = delta.svd()
    values = torch.zeros(min(*delta.shape, delta.left.shape[1]), dtype=S.dtype, device=S.device)
    values[: len(S)] = S
    return Spectrum(values)
