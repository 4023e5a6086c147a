"""Combine, truncate and compare adapters, given as values or as files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any

import torch

from lora_inject.algebra.combining import Method, Sign
from lora_inject.algebra.values import Truncated, paired, truncation
from lora_inject.core.adapter.parts import compared
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.tables import Listing, wrapped
from lora_inject.core.spec.words import printable
from lora_inject.errors import check_type
from lora_inject.formats.exchange import read_adapter

Adapter = AdapterState | str | PathLike[str]


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    majority_sign: Sign = "total",
    seed: int = 0,
    any_base: bool = False,
) -> AdapterState:
    """Combine several adapters of one base into one.

    | method | what it does |
    |---|---|
    | `cat` | the exact sum of weight times update; ranks add up |
    | `svd` | the exact sum, cut to the best `rank` (default: the largest of them) |
    | `linear` | adds the A and adds the B, with roots of the weights: a rough approximation |
    | `ties`, `magnitude_prune` | `linear` of the largest values; ties: of the elected sign |
    | `dare_linear`, `dare_ties` | `linear` or `ties` of a random share of the values, scaled up |
    | those with `_svd` | the same on the dense delta of one site at a time, cut to `rank` |

    All but `cat`, `svd` and `linear` need `density`. The methods and their names are those of
    PEFT's `add_weighted_adapter`, with the same results (DARE: with other random numbers).

    Args:
        adapters: Values, or paths of files.
        weights: One for each, 1 by default; not 0.
        method: See above.
        rank: Of the result, for `svd` and the methods with `_svd`.
        density: Share of the values to keep, in (0, 1].
        majority_sign: How ties elects a sign: by the sum (`total`) or the count (`frequency`).
        seed: Seed of DARE. The mask of a tensor also depends on the site and on the adapter's
            position, but not on the other adapters.
        any_base: Add adapters of different bases, for the base of the first: what was trained after
            the first was merged.

    Returns:
        The adapter, computed in float32 or float64 and rounded once to the adapters' dtype. `cat`
        keeps the bits of tensors; where scales differ, 16 bits become float32.

    Raises:
        StateError: Adapters of different bases, sites of different shapes, an update that depends
            on the base (DoRA), NaN or Inf, a trained tensor whose weights do not add up to 1, or
            wrong options.
        FormatError: A file cannot be read.

    Examples:
        >>> import torch
        >>> from lora_inject.core.adapter.site_state import SiteState
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> spec = SiteSpec("fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> a = AdapterState({"fc": SiteState(spec, torch.rand(2, 4), torch.rand(6, 2))})
        >>> combine([a, a], [0.7, 0.3]).sites["fc"].spec.rank
        4
        >>> small = combine([a, a], [0.7, 0.3], method="svd")
        >>> small.sites["fc"].spec.rank, round(diff(small, a).cosine, 4)
        (2, 1.0)
    """
    for what, given in (("adapters", adapters), ("weights", () if weights is None else weights)):
        check_type(f"combine, {what}", given, Iterable, "Give a list, with one entry for each")
    made = Method(method, rank, density, majority_sign, seed)
    given = list(adapters)
    names = (f"combine, adapter {n} of {len(given)}" for n in range(1, 1 + len(given)))
    states = [state_of(*each) for each in zip(given, names, strict=True)]
    if any_base:
        states[1:] = [replace(state, fingerprint=None) for state in states[1:]]
    return made.combined(states, weights)


def truncate(
    adapter: Adapter, *, rank: int | None = None, energy: float | None = None
) -> Truncated:
    """Cut an adapter to its best approximation of a lower rank, in Frobenius norm, site by site.

    Uses a QR of the thin factors and an SVD of r by r in float64, without forming a delta. A frozen
    start (pissa, olora) is a part of the update. The new sites have scale 1, `alpha = rank`.

    Args:
        adapter: A value, or the path of its files.
        rank: Rank of each site, at most.
        energy: Share of each update's sum of squares to keep, in (0, 1]; the rank follows.

    Returns:
        The adapter and the error of each site.

    Raises:
        StateError: An update that depends on the base (DoRA), NaN or Inf, or neither `rank` nor
            `energy`.
        FormatError: A file cannot be read.

    Examples:
        >>> import torch
        >>> from lora_inject.core.adapter.site_state import SiteState
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> spec = SiteSpec("fc", "linear", 4, 6, (6, 4), rank=2, alpha=2)
        >>> A, B = torch.eye(2, 4), torch.eye(6, 2) * torch.tensor([4.0, 3.0])
        >>> truncate(AdapterState({"fc": SiteState(spec, A, B)}), rank=1).sites["fc"]
        Cut(before=2, rank=1, error=0.6)
    """
    return truncation(state_of(adapter, "truncate"), rank, energy)


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

    def text(self, width: int = 80, *, everything: bool = False) -> str:
        """Return the sites, those of one kind in one line unless `everything`, and the totals."""
        heads = ("site", "ranks", "|one|", "|two|", "|one - two|", "cosine")
        cells = tuple(
            (name, "{} and {}".format(*site.ranks), *site.norms, site.distance, site.cosine)
            for name, site in self.sites.items()
        )
        lines = [*Listing(heads, cells).lines(width, everything=everything)]
        for name, apart in self.trained.items():
            where = "in only one of them" if apart is None else f"|one - two| = {apart:.3g}"
            lines.append(f"trained {printable(name)}: {where}")
        if self.equal:
            likeness = "equal in every bit"
        elif self.distance == 0 and all(apart == 0 for apart in self.trained.values()):
            likeness = "equal values; the configs or fingerprints differ"
        else:
            likeness = "not equal"
        cosine = "-" if self.cosine is None else f"{self.cosine:.6f}"
        whole = f"|one - two| = {self.distance:.6g}"
        return "\n".join(
            [*lines, *wrapped(f"{likeness}; {whole}, cosine {cosine}, over all sites", width)]
        )


def diff(one: Adapter, two: Adapter) -> Difference:
    """Compare two adapters of one base, site by site, without forming a delta.

    Args:
        one: A value, or the path of its files.
        two: The other.

    Returns:
        Ranks, norms, distance and cosine of each site, and the distance of trained tensors.

    Raises:
        StateError: They are of different bases, a site has another shape or an update that depends
            on the base (DoRA), or one holds NaN or Inf. It says which of the two.
        FormatError: A file cannot be read.

    Examples:
        >>> import torch
        >>> from lora_inject.core.adapter.site_state import SiteState
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> spec = SiteSpec("fc", "linear", 4, 6, (6, 4), rank=2, alpha=4)
        >>> a = AdapterState({"fc": SiteState(spec, torch.eye(2, 4), torch.eye(6, 2))})
        >>> difference = diff(a, a * 3.0)
        >>> difference.equal, [round(n, 4) for n in difference.sites["fc"].norms]
        (False, [2.8284, 8.4853])
        >>> round(difference.distance, 4)
        5.6569
    """
    one, two = state_of(one, "diff, one"), state_of(two, "diff, two")
    sites = {name: _site(*pair) for name, *pair in paired(one, two, "diff")}
    trained: dict[str, float | None] = {}
    for name in {**one.trained, **two.trained}:
        a, b = one.trained.get(name), two.trained.get(name)
        if one.rows.get(name) != two.rows.get(name):
            a = None  # other rows of it
        there = a is not None and b is not None and a.shape == b.shape
        trained[name] = float(torch.linalg.vector_norm(a.double() - b.double())) if there else None  # type: ignore[union-attr]
    return Difference(sites, trained, one == two)


def state_of(adapter: Adapter, asked: str) -> AdapterState:
    """Return a value as it is, or that of a file; its tensors are read when they are used."""
    if isinstance(adapter, AdapterState):
        return adapter
    remedy = "Give an AdapterState, or the path of its files"
    check_type(asked, adapter, (str, PathLike), remedy)
    return read_adapter(adapter)


def _site(one: SiteState | None, two: SiteState | None) -> SiteDifference:
    ranks = one.spec.rank if one else 0, two.spec.rank if two else 0
    norms, dot, distance = compared(one, two)
    cosine = dot / (norms[0] * norms[1]) if all(norms) else None
    return SiteDifference(ranks, norms, distance, cosine)
