"""Combine, truncate and compare adapters, given as values or as files.

Source of the methods on A and B and of their variants with `_svd`: peft 0.21.2,
`LoraModel.add_weighted_adapter` and utils/merge_utils.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from numbers import Integral, Real
from os import PathLike
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_inject.algebra.one_site import Cut, SiteDifference, compared, plain, truncated
from lora_inject.algebra.svd import decompose
from lora_inject.algebra.values import called, paired, weighted_sum, with_sites
from lora_inject.core.adapter.other_tensors import with_every_expert
from lora_inject.core.adapter.parts import Term, gathered
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.names import printable
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.tables import Listing, ListReport, wrapped
from lora_inject.errors import StateError, check_list, check_type, within
from lora_inject.formats.exchange import read_adapter

Adapter = AdapterState | str | PathLike[str]
Sign = Literal["total", "frequency"]

ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = ("cat", "svd", *ON_FACTORS, *(f"{name}_svd" for name in ON_FACTORS[1:]))
"""`cat` and `svd` are exact sums; those of ON_FACTORS work on A and B, with `_svd` on the delta."""


def state_of(adapter: Adapter, asked: str) -> AdapterState:
    """Return a value as it is, or that of a file."""
    if isinstance(adapter, AdapterState):
        with within(asked):
            adapter.check_tensors(StateError)
        return adapter
    remedy = "Give an AdapterState, or the path of its files"
    check_type(asked, adapter, (str, PathLike), remedy)
    return read_adapter(adapter)


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
    asked = f"combine by {method!r}"
    for what, given in (("adapters", adapters), ("weights", () if weights is None else weights)):
        check_list(f"combine, {what}", given, "Give a list, with one entry for each")
    _check_options(asked, method, rank, density, majority_sign)
    given = list(adapters)
    names = (f"combine, adapter {n} of {len(given)}" for n in range(1, 1 + len(given)))
    states = [state_of(*each) for each in zip(given, names, strict=True)]
    if any_base:
        states[1:] = [replace(state, fingerprint=None) for state in states[1:]]
    weights = [1.0] * len(states) if weights is None else list(weights)
    if not states:
        raise StateError(asked, "no adapter is given", "Give at least one")
    if len(weights) != len(states):
        problem = f"there are {len(weights)} weights for {len(states)} adapters"
        raise StateError(asked, problem, "Give one for each")
    for state, name in zip(states, called(states), strict=True):
        state.check_finite(f"{asked}, {name}")
    if method not in ("cat", "svd"):
        mixing = _Mixing(asked, method, rank, density or 1, majority_sign, seed)
        make = mixing.on_delta if method.endswith("_svd") else mixing.on_factors
        return with_sites(states, weights, make, asked)
    summed = weighted_sum(states, weights, asked)
    if method == "cat":
        return summed
    sites = {}
    for name, site in summed.sites.items():
        there = [state.sites[name] for state in states if name in state.sites]
        most, dtype = rank or max(each.spec.rank for each in there), _common_dtype(there)
        sites[name], _ = truncated(site, most, None, asked, dtype)
    return replace(summed, sites=sites)


def _check_options(
    asked: str, method: str, rank: int | None, density: float | None, majority_sign: str
) -> None:
    """Refuse options that are missing, wrong or without effect."""
    if method not in METHODS:
        raise StateError(asked, "there is no such method", f"Choose one of {', '.join(METHODS)}")
    if rank is not None:
        _check_rank(f"{asked}, rank", rank)
        if not method.endswith("svd"):
            remedy = "Give rank to svd, or to a method with _svd"
            raise StateError(asked, "the method keeps all ranks, and rank is given", remedy)
    drops = method not in ("cat", "svd", "linear")
    if density is not None:
        _check_share(f"{asked}, density", density)
        if not drops:
            problem = "the method keeps all values, and density is given"
            raise StateError(asked, problem, "Leave density out")
    elif drops:
        remedy = "Give the share of values to keep, in (0, 1]"
        raise StateError(asked, "density is missing", remedy)
    if majority_sign not in ("total", "frequency"):
        raise StateError(asked, f"majority_sign is {majority_sign!r}", "Give total or frequency")


def _check_rank(asked: str, rank: object) -> None:
    check_type(asked, rank, Integral, "Give a whole number from 1")
    if rank < 1:  # type: ignore[operator]
        raise StateError(asked, f"it is {rank}", "Give 1 or more")


def _check_share(asked: str, share: float) -> None:
    check_type(asked, share, Real, "Give a share, in (0, 1]")
    if not 0 < share <= 1:
        raise StateError(asked, f"it is {share}", "Give a share, in (0, 1]")


@dataclass(frozen=True)
class _Mixing:
    """A published way to mix the factors, or the deltas, of the sites of one name."""

    asked: str
    name: str
    rank: int | None
    density: float
    majority_sign: Sign
    seed: int

    def on_factors(
        self, there: Sequence[Term], like: SiteSpec, holders: Mapping[int, str]
    ) -> SiteState:
        """Mix the A and mix the B, each weighted by the root of weight times scale."""
        first, names = there[0][0].spec, [*holders.values()]
        for (site, _), name in zip(there, names, strict=True):
            spec = plain(site, f"{self.asked}, {name}").spec
            if (spec.rank, spec.slices) != (first.rank, first.slices) or site.A0 is not None:
                problem = f"{names[0]} has rank {first.rank} and {name} rank {spec.rank}"
                if spec.rank == first.rank:
                    problem = f"{name} has other slices than {names[0]}"
                if site.A0 is not None:
                    problem = f"{name} has a frozen start"
                asked = f"{self.asked}, site '{like.name}'"
                raise StateError(asked, problem, "Use cat, svd, or a method with _svd")
        factors = [weight * site.scale for site, weight in there]
        roots = [math.sqrt(abs(factor)) for factor in factors]
        signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
        sites = dict(zip(holders, (site for site, _ in there), strict=True))
        A = self._mixed(
            {n: s.A.detach().cpu().double() for n, s in sites.items()}, signed, like, "A"
        )
        B = self._mixed(
            {n: s.B.detach().cpu().double() for n, s in sites.items()}, roots, like, "B"
        )
        return _made(replace(like, slices=first.slices), first.rank, A, B, there)

    def on_delta(
        self, there: Sequence[Term], like: SiteSpec, holders: Mapping[int, str]
    ) -> SiteState:
        """Mix the dense deltas of one site, and return the best approximation of low rank."""
        for (site, _), name in zip(there, holders.values(), strict=True):
            plain(site, f"{self.asked}, {name}")
        wide = all(site.A.dtype == torch.float64 for site, _ in there)
        dtype = torch.float64 if wide else torch.float32
        deltas = {n: _dense(site, dtype) for n, (site, _) in zip(holders, there, strict=True)}
        mix = self._mixed(deltas, [weight for _, weight in there], like, "W")
        most = self.rank or max(site.spec.rank for site, _ in there)
        halves = [decompose(matrix.to(dtype), most) for matrix in mix]
        A = torch.stack([(half.V * half.S.sqrt()).T for half in halves])
        B = torch.stack([half.U * half.S.sqrt() for half in halves])
        return _made(replace(like, slices=None), B.shape[-1], A, B, there)

    def _mixed(
        self, given: Mapping[int, Tensor], weights: Sequence[float], like: SiteSpec, what: str
    ) -> Tensor:
        """Mix tensors of one shape, by their adapters' places: drop values, elect signs, add."""
        method, density = self.name.removesuffix("_svd"), self.density
        tensors = whole = [*given.values()]
        if method in ("ties", "magnitude_prune"):
            tensors = [_largest(tensor, density) for tensor in tensors]
        elif method.startswith("dare"):
            name = f"{self.seed} {like.name} {what}"
            masks = [kept(t.shape, density, f"{name} {n}") for n, t in given.items()]
            tensors = [t * mask / density for t, mask in zip(tensors, masks, strict=True)]
        if not any(map(torch.any, tensors)) and any(map(torch.any, whole)):
            asked = f"{self.asked}, site '{like.name}'"
            n = tensors[0].numel()
            problem = f"density {density:g} keeps none of the {n:,} values of {what}"
            raise StateError(asked, problem, "Give a larger density, or use svd")
        stack = torch.stack(tensors)
        mix = stack * stack.new_tensor(weights).view(-1, *[1] * tensors[0].ndim)
        if "ties" not in method:
            return mix.sum(0)
        elected = stack.sum(0) if self.majority_sign == "total" else stack.sign().sum(0)
        agree = stack.sign() == torch.where(elected >= 0, 1, -1)
        return (mix * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """Keep a share of the values, the largest (TIES, arXiv:2306.01708, section 4.1)."""
    flat = tensor.flatten()
    keep = torch.zeros_like(flat)
    keep[flat.abs().topk(int(density * flat.numel())).indices] = 1
    return tensor * keep.view(tensor.shape)


def kept(shape: Sequence[int], density: float, what: str) -> Tensor:
    """Return DARE's mask of 1 and 0 (arXiv:2311.03099), random with the text as its seed."""
    digest = hashlib.blake2b(what.encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest) >> 1)
    drawn = torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")
    return drawn.lt(density).double()


def _dense(site: SiteState, dtype: torch.dtype) -> Tensor:
    """The delta of a site, `(experts, out, in)`."""
    spec = site.spec
    shape = spec.experts or 1, spec.out_features, spec.in_features
    delta = torch.zeros(shape, dtype=dtype, device="cpu")
    for (start, stop), left, right in gathered([(site, 1.0)]):
        delta[:, start:stop] = left.cpu().to(dtype) @ right.cpu().to(dtype)
    return delta


def _made(like: SiteSpec, rank: int, A: Tensor, B: Tensor, there: Sequence[Term]) -> SiteState:
    """Return a site with scale 1, in the dtype of those that it was made of."""
    spec = replace(like, rank=rank, alpha=float(rank), scaling="standard", init="kaiming")
    dtype = _common_dtype([site for site, _ in there])
    return SiteState(spec, A.reshape(spec.a_shape).to(dtype), B.reshape(spec.b_shape).to(dtype))


def _common_dtype(sites: Iterable[SiteState]) -> torch.dtype:
    """Return the dtype of A of some sites, or what holds all of them."""
    return reduce(torch.promote_types, (site.A.dtype for site in sites))


class Truncated(NamedTuple):
    """The result of `lora_inject.truncate`.

    Attributes:
        state: The adapter.
        sites: For each site its rank before and now, and the relative error.
    """

    state: AdapterState
    sites: dict[str, Cut]


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
    asked = "truncate"
    state = with_every_expert(state_of(adapter, asked))
    if rank is None and energy is None:
        raise StateError(asked, "neither rank nor energy is given", "Give one of them")
    if rank is not None:
        _check_rank(f"{asked}, rank", rank)
    if energy is not None:
        _check_share(f"{asked}, energy", energy)
    state.check_finite(asked)
    made = {name: truncated(site, rank, energy, asked) for name, site in state.sites.items()}
    sites = {name: site for name, (site, _) in made.items()}
    cuts = {name: cut for name, (_, cut) in made.items()}
    return Truncated(replace(state, sites=sites, config=None), cuts)


@dataclass(frozen=True)
class Difference(ListReport):
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

    def _lines(self, width: int, *, everything: bool) -> Iterator[str]:
        """Yield the sites, those of one kind in one line unless `everything`, and the totals."""
        heads = ("site", "ranks", "|one|", "|two|", "|one - two|", "cosine")
        cells = tuple(
            (name, "{} and {}".format(*site.ranks), *site.norms, site.distance, site.cosine)
            for name, site in self.sites.items()
        )
        yield from Listing(heads, cells).lines(width, everything=everything)
        for name, apart in self.trained.items():
            where = "in only one of them" if apart is None else f"|one - two| = {apart:.3g}"
            yield f"trained {printable(name)}: {where}"
        if self.equal:
            likeness = "equal in every bit"
        elif self.distance == 0 and all(apart == 0 for apart in self.trained.values()):
            likeness = "equal values; the configs or fingerprints differ"
        else:
            likeness = "not equal"
        cosine = "-" if self.cosine is None else f"{self.cosine:.6f}"
        whole = f"|one - two| = {self.distance:.6g}"
        yield from wrapped(f"{likeness}; {whole}, cosine {cosine}, over all sites", width)


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
        >>> difference = diff(a, combine([a], [3.0]))
        >>> difference.equal, [round(n, 4) for n in difference.sites["fc"].norms]
        (False, [2.8284, 8.4853])
        >>> round(difference.distance, 4)
        5.6569
    """
    one, two = state_of(one, "diff, one"), state_of(two, "diff, two")
    sites = {name: compared(*pair) for name, *pair in paired(one, two, "diff")}
    trained: dict[str, float | None] = {}
    for name in {**one.trained, **two.trained}:
        a, b = one.trained.get(name), two.trained.get(name)
        if one.rows.get(name) != two.rows.get(name):
            a = None  # other rows of it
        there = a is not None and b is not None and a.shape == b.shape
        trained[name] = float(torch.linalg.vector_norm(a.double() - b.double())) if there else None  # type: ignore[union-attr]
    return Difference(sites, trained, one == two)
