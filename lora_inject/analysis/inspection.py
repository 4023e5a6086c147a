"""What `lora-inject inspect` shows of an adapter: sizes, norms, and values that are not finite."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_inject.analysis.numbers import site_blocks
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.names import counted
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.tables import Figures, Listing, ListReport, listed, sides, wrapped
from lora_inject.core.spec.variants import VARIANTS

_OF_SPEC = (
    *("name", "kind", "variant", "in_features", "out_features"),
    *("rank", "alpha", "scaling", "scale"),
)


@dataclass(frozen=True)
class TensorFigures(Figures):
    """One tensor in numbers: its Frobenius norm is NaN or Inf if a value is."""

    shape: tuple[int, ...]
    dtype: str
    norm: float
    n_nonfinite: int

    @property
    def n_elements(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class SiteFigures(Figures):
    """One site in numbers."""

    spec: SiteSpec
    A: TensorFigures
    B: TensorFigures
    further: dict[str, TensorFigures]  # by role: m of DoRA, b of lora_bias, A0, B0
    delta_norm: float  # of `scale * B @ A` (DoRA: without the gain), less the frozen start if any
    frozen_start: bool  # whether there is one (pissa, olora)

    @property
    def slices(self) -> tuple[str, ...]:
        """Names of the adapted slices, empty for a whole site."""
        return self.spec.slices.adapt if self.spec.slices else ()

    @property
    def n_nonfinite(self) -> int:
        """Values that are NaN or Inf, in all its tensors."""
        return sum(tensor.n_nonfinite for tensor in (self.A, self.B, *self.further.values()))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data, with what the spec says in numbers."""
        own = {key: value for key, value in super().to_dict().items() if key != "spec"}
        return {**{key: getattr(self.spec, key) for key in _OF_SPEC}, **own}

    def cells(self, further: Sequence[str]) -> tuple[Any, ...]:
        """Return the row of a table, with the norms of these further tensors."""
        spec, variants = self.spec, "" if self.spec.variant == "lora" else f", {self.spec.variant}"
        slices = f" [{', '.join(self.slices)}]" if self.slices else ""
        return (
            spec.name,
            spec.kind + (" - start" if self.frozen_start else "") + variants,
            f"{spec.in_features:,} -> {spec.out_features:,}{slices}",
            f"{spec.rank}",
            f"{spec.scale:g}",
            self.A.norm,
            self.B.norm,
            self.delta_norm,
            *(self.further[role].norm if role in self.further else None for role in further),
        )


@dataclass(frozen=True)
class Inspection(ListReport):
    """An adapter in numbers."""

    sites: tuple[SiteFigures, ...]
    trained: dict[str, TensorFigures]  # full trained copies by the name of the base's tensor
    base_copies: dict[str, TensorFigures]  # base tensors that the file carries along, by name
    config: dict[str, Any] | None  # what it was made from, None where it is not known
    n_fingerprinted: int  # base tensors that the file can recognize

    @property
    def n_sites(self) -> int:
        """How many sites there are."""
        return len(self.sites)

    @property
    def n_lora(self) -> int:
        """Elements of A and B of all sites."""
        return sum(site.A.n_elements + site.B.n_elements for site in self.sites)

    @property
    def n_further(self) -> dict[str, int]:
        """Elements of the other trainable tensors of all sites, by role."""
        counts: Counter[str] = Counter()
        for site in self.sites:
            for role, tensor in site.further.items():
                if role in site.spec.shapes:
                    counts[role] += tensor.n_elements
        return dict(counts)

    @property
    def n_trained(self) -> int:
        """Elements of the full trained copies."""
        return sum(tensor.n_elements for tensor in self.trained.values())

    @property
    def n_nonfinite(self) -> int:
        """Values that are NaN or Inf, in all tensors."""
        tensors = (*self.trained.values(), *self.base_copies.values())
        in_sites = sum(site.n_nonfinite for site in self.sites)
        return in_sites + sum(tensor.n_nonfinite for tensor in tensors)

    def _lines(self, width: int, *, everything: bool) -> Iterator[str]:
        if self.sites:
            further = tuple(self.n_further)
            norms = ("|A|", "|B|", "|delta|", *(f"|{role}|" for role in further))
            heads = ("site", "kind", "shape", "rank", "scale", *norms)
            rows = Listing(heads, tuple(site.cells(further) for site in self.sites))
            joined = "Norms of several sites are medians; --all lists each site."
            yield from rows.lines(width, everything=everything, joined=joined)
            if any(VARIANTS[site.spec.variant].gained for site in self.sites):
                yield from wrapped("Of DoRA |delta| is |scale B A|, without the gain by m.", width)
            yield ""
        whole = [("trained", *item) for item in self.trained.items()]
        whole += [("copy of the base", *item) for item in self.base_copies.items()]
        if whole:
            cells = ((n, what, sides(t.shape), t.dtype, t.norm) for what, n, t in whole)
            rows = Listing(("tensor", "", "shape", "dtype", "norm"), tuple(cells))
            yield from rows.lines(width, everything=everything)
            yield ""
        counts = [(site.spec.name, site.n_nonfinite) for site in self.sites]
        counts += [(name, tensor.n_nonfinite) for _, name, tensor in whole]
        bad = (f"{name} ({n:,})" for name, n in counts if n)
        yield from listed("NaN or Inf in", bad, width, everything=everything)
        yield from wrapped(self._totals(), width)

    def _totals(self) -> str:
        further = "".join(f", {n:,} in {role}" for role, n in self.n_further.items())
        parts = [f"{counted(len(self.sites), 'site')}: {self.n_lora:,} in A and B{further}"]
        if self.trained:
            tensors = counted(len(self.trained), "trained tensor")
            parts.append(f"{self.n_trained:,} in {tensors}")
        known, bad = self.n_fingerprinted, self.n_nonfinite
        parts.append(f"base known by {counted(known, 'tensor')}" if known else "base not named")
        parts.append(f"{counted(bad, 'value')} NaN or Inf" if bad else "finite")
        return "; ".join(parts)


def inspect_state(state: AdapterState) -> Inspection:
    """Compute the figures of an adapter.

    Args:
        state: The adapter.

    Returns:
        Its sizes, norms and non-finite values.

    Examples:
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> spec = SiteSpec("fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> site = SiteState(spec, torch.ones(2, 4), torch.ones(6, 2))
        >>> figures = inspect_state(AdapterState({"fc": site})).sites[0]
        >>> round(figures.delta_norm**2, 6)  # 24 values of 2 * (1 + 1)
        384.0
    """
    return Inspection(
        sites=tuple(map(_site, state.sites.values())),
        trained={name: _tensor(t) for name, t in state.trained.items()},
        base_copies={name: _tensor(t) for name, t in state.base_copies.items()},
        config=None if state.config is None else dict(state.config),
        n_fingerprinted=sum(
            known.values is not None for known in (state.fingerprint or {}).values()
        ),
    )


def _tensor(tensor: Tensor) -> TensorFigures:
    wide = tensor.detach().double()
    return TensorFigures(
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        norm=float(torch.linalg.vector_norm(wide)),
        n_nonfinite=int((~torch.isfinite(wide)).sum()),
    )


def _site(site: SiteState) -> SiteFigures:
    square = sum(block.delta.square() for block in site_blocks(site, checked=False))
    tensors = {role: _tensor(tensor) for role, tensor in site.tensors.items()}
    A, B = tensors.pop("A"), tensors.pop("B")
    return SiteFigures(site.spec, A, B, tensors, math.sqrt(square), site.A0 is not None)
