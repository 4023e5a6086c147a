"""What differs between two adapters: site by site, without forming a delta."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lora_inject.adapter.algebra import compared
from lora_inject.adapter.site_state import SiteState
from lora_inject.adapter.state import AdapterState, paired


@dataclass(frozen=True)
class SiteDifference:
    """One site in two adapters: ranks and Frobenius norms, 0 where an adapter lacks it.

    `distance` is the norm of the difference, `cosine` that of the angle, None where one is zero.
    """

    ranks: tuple[int, int]
    norms: tuple[float, float]
    distance: float
    cosine: float | None


@dataclass(frozen=True)
class Difference:
    """Two adapters compared.

    Attributes:
        sites: Every site of either.
        trained: Trained tensors of either: the norm of their difference, None where one lacks it.
        equal: Whether they are equal in every bit and number.
        distance: Frobenius norm of the difference of the updates, over all sites.
        cosine: Cosine of the angle between them, over all sites; None where one is zero.
    """

    sites: dict[str, SiteDifference]
    trained: dict[str, float | None]
    equal: bool

    @property
    def distance(self) -> float:  # noqa: D102  (stated above)
        return math.hypot(*(site.distance for site in self.sites.values()))

    @property
    def cosine(self) -> float | None:  # noqa: D102
        sizes = [math.hypot(*(site.norms[k] for site in self.sites.values())) for k in (0, 1)]
        dots = (s.cosine * s.norms[0] * s.norms[1] for s in self.sites.values() if s.cosine)
        return sum(dots) / (sizes[0] * sizes[1]) if all(sizes) else None

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        return {**asdict(self), "distance": self.distance, "cosine": self.cosine}


def difference(one: AdapterState, two: AdapterState) -> Difference:
    """Compare two adapters of one base; see `lora_inject.diff`."""
    sites = {name: _site(*pair) for name, *pair in paired(one, two, "diff")}
    trained: dict[str, float | None] = {}
    for name in {**one.trained, **two.trained}:
        a, b = one.trained.get(name), two.trained.get(name)
        if one.rows.get(name) != two.rows.get(name):
            a = None  # other rows of it
        there = a is not None and b is not None and a.shape == b.shape
        trained[name] = float(torch.linalg.vector_norm(a.double() - b.double())) if there else None  # type: ignore[union-attr]
    return Difference(sites, trained, one == two)


def _site(one: SiteState | None, two: SiteState | None) -> SiteDifference:
    ranks = one.spec.rank if one else 0, two.spec.rank if two else 0
    norms, dot, distance = compared(one, two)
    cosine = dot / (norms[0] * norms[1]) if all(norms) else None
    return SiteDifference(ranks, norms, distance, cosine)
