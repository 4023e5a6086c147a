"""Arithmetic on whole adapters as values: sums and truncations.

`AdapterState` has the operators; here is what they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, NamedTuple

from torch import Tensor

from lora_inject.algebra.one_base import check_one_base, common_copies
from lora_inject.core.adapter.fingerprint import union_of
from lora_inject.core.adapter.other_tensors import site_mapped, with_every_expert
from lora_inject.core.adapter.parts import (
    Cut,
    Term,
    check_alike,
    mixed,
    plain,
    total,
    truncated,
)
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import StateError, check_type


def scaled(state: AdapterState, weight: float) -> AdapterState:
    """Return an adapter whose update is multiplied by a number."""
    check_type("multiply an adapter", weight, Real, "Give a number")
    return weighted_sum([state], [float(weight)], f"{weight} * an adapter")


def added(one: AdapterState, other: AdapterState, weight: float) -> AdapterState:
    """Return an adapter plus 1 or -1 times another."""
    asked = "add adapters" if weight > 0 else "subtract adapters"
    return weighted_sum([one, other], [1.0, weight], asked)


class Truncated(NamedTuple):
    """The result of `lora_inject.truncate`.

    Attributes:
        state: The adapter.
        sites: For each site its rank before and now, and the relative error.
    """

    state: AdapterState
    sites: dict[str, Cut]


def truncation(state: AdapterState, rank: int | None, energy: float | None) -> Truncated:
    """Return the truncated adapter, with rank and error of each site."""
    asked = "truncate"
    if rank is None and energy is None:
        raise StateError(asked, "neither rank nor energy is given", "Give one of them")
    if rank is not None:
        check_type(f"{asked}, rank", rank, Integral, "Give a whole number from 1")
        if rank < 1:
            raise StateError(asked, f"rank is {rank}", "Give 1 or more")
    if energy is not None:
        check_type(f"{asked}, energy", energy, Real, "Give a share, in (0, 1]")
        if not 0 < energy <= 1:
            raise StateError(asked, f"energy is {energy}", "Give a share of the squares, in (0, 1]")
    state.check_finite(asked)
    made = {name: truncated(site, rank, energy, asked) for name, site in state.sites.items()}
    sites = {name: site for name, (site, _) in made.items()}
    return Truncated(
        replace(state, sites=sites, config=None), {name: cut for name, (_, cut) in made.items()}
    )


def called(states: Sequence[Any]) -> list[str]:
    """Return what messages call each of several adapters: its files, or its place among them."""
    places = [f"adapter {n} of {len(states)}" for n in range(1, 1 + len(states))]
    sources = [getattr(state, "source", "") for state in states]
    names = [repr(s) if s else place for s, place in zip(sources, places, strict=True)]
    return names if len(names) > 1 or any(sources) else ["the adapter"][: len(names)]


def paired(
    one: AdapterState, two: AdapterState, asked: str
) -> Iterator[tuple[str, SiteState | None, SiteState | None]]:
    """Yield the sites of two adapters by name; check base, shapes and finite values.

    Values that are in a file are read here, once.
    """
    names = _check_adapters([one, two], asked)
    one, two = with_every_expert(one), with_every_expert(two)
    for state, name in zip((one, two), names, strict=True):
        replace(state, sites={}).check_finite(f"{asked}, {name}")
    for site in {**one.sites, **two.sites}:
        sites_of_both: list[SiteState | None] = []
        for state, name in zip((one, two), names, strict=True):
            sites_of_both.append(state.sites.get(site) and site_mapped(state.sites[site], _read))
            if (there := sites_of_both[-1]) is not None:
                plain(there, where := f"{asked}, {name}")
                AdapterState({site: there}).check_finite(where)
        holders = [name for name, s in zip(names, sites_of_both, strict=True) if s]
        check_alike([s.spec for s in sites_of_both if s], holders, asked)
        yield site, sites_of_both[0], sites_of_both[1]


def _read(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def weighted_sum(
    states: Sequence[AdapterState], weights: Sequence[float], asked: str
) -> AdapterState:
    """Return the exact `sum of weight * adapter`, ranks concatenated."""

    def make(sites: Sequence[Term], like: SiteSpec, names: Sequence[str]) -> SiteState:
        if len(sites) == 1 and sites[0][1] == 1:
            return sites[0][0]
        for (site, _), name in zip(sites, names, strict=True):
            plain(site, f"{asked}, {name}", bias=True)
        if len(sites) > 1:
            return total(sites, like)
        ((site, weight),) = sites
        spec = replace(site.spec, alpha=site.spec.alpha * abs(weight))
        if not 0 < spec.alpha < math.inf:
            where = f"{asked}, {names[0]}, site '{spec.name}'"
            problem = f"its alpha would become {spec.alpha}"
            raise StateError(where, problem, "Give a weight nearer to 1")
        turned = {r: t if r[0] == "A" or weight > 0 else -t for r, t in site.tensors.items()}
        return SiteState.of(spec, turned)

    return with_sites(states, weights, make, asked)


def with_sites(
    states: Sequence[AdapterState],
    weights: Sequence[float],
    make: Callable[[Sequence[Term], SiteSpec, Sequence[str]], SiteState],
    asked: str,
) -> AdapterState:
    """Return one adapter of several: `make` makes each site; trained tensors are mixed.

    `make` gets the sites with their weights, what the new site is like, and the adapters' names.
    """
    names = _check_adapters(states, asked)
    states = [with_every_expert(state) for state in states]
    named = [_Named(*three) for three in zip(names, states, weights, strict=True)]
    for one in named:
        _check_term(one.state, one.weight, one.name, asked)
    trained = mixed([(one.state.trained, one.weight) for one in named], names, asked)
    sites = {}
    for site in dict.fromkeys(name for state in states for name in state.sites):
        holders = [one for one in named if site in one.state.sites]
        sites[site] = _made(site, holders, make, asked)
        if twice := _tensors_of(sites[site].spec) & trained.keys():
            raise _held_twice(min(twice), holders[0].name, named, asked)
    marks = [state.fingerprint for state in states if state.fingerprint is not None]
    copies = common_copies([state.base_copies for state in states], names, asked)
    union = union_of(marks) if marks else None
    return AdapterState(sites, trained, None, union, copies)


class _Named(NamedTuple):
    """An adapter among others, as messages call it, with its weight."""

    name: str
    state: AdapterState
    weight: float


def _made(
    site: str,
    holders: Sequence[_Named],
    make: Callable[[Sequence[Term], SiteSpec, Sequence[str]], SiteState],
    asked: str,
) -> SiteState:
    names = [one.name for one in holders]
    terms = [(one.state.sites[site], one.weight) for one in holders]
    check_alike([term.spec for term, _ in terms], names, asked)
    # With the base known, kinds of layers are known; for a foreign file they are assumed.
    surest = min(holders, key=lambda one: one.state.fingerprint is None)
    return make(terms, surest.state.sites[site].spec, names)


def _held_twice(name: str, holder: str, named: Iterable[_Named], asked: str) -> StateError:
    other = next(one.name for one in named if name in one.state.trained)
    problem = f"{holder} updates '{name}' and {other} holds a trained copy of it"
    return StateError(asked, problem, "Merge both adapters into the base instead")


def _check_term(state: AdapterState, weight: float, name: str, asked: str) -> None:
    """Refuse a weight that is no finite number, and an adapter of single rows."""
    where, remedy = f"{asked}, the weight of {name}", "Give a finite number other than 0"
    check_type(where, weight, Real, remedy)
    if not math.isfinite(weight) or weight == 0:
        raise StateError(where, f"it is {weight}", remedy)
    for rows in state.rows:
        problem = f"it trains single rows of '{rows}', which replace the base's"
        remedy = "Merge the adapters into the base one after the other"
        raise StateError(f"{asked}, {name}", problem, remedy)


def _check_adapters(states: Sequence[AdapterState], asked: str) -> list[str]:
    """Refuse what is no adapter, and adapters of different bases; return what to call each."""
    names = called(states)
    remedy = "Give an AdapterState, as adapter_state(model) does"
    for state, name in zip(states, names, strict=True):
        check_type(f"{asked}, {name}", state, AdapterState, remedy)
    check_one_base([state.fingerprint for state in states], names, asked)
    return names


def _tensors_of(spec: SiteSpec) -> set[str]:
    """Return the names of the base's tensors that a site updates."""
    bias = f"{spec.weight.removesuffix('weight')}bias"
    return {spec.weight, *([bias] if spec.lora_bias else [])}
