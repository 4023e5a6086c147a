"""Sums of whole adapters as values, and what several must have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import combinations
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lora_inject.algebra.one_site import plain
from lora_inject.core.adapter.fingerprint import (
    Fingerprint,
    base_differences,
    same_values,
    union_of,
    unverifiable,
    without_weights,
)
from lora_inject.core.adapter.other_tensors import with_every_expert
from lora_inject.core.adapter.parts import Term, check_alike, total
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import StateError, check_type, within


def called(states: Sequence[Any]) -> list[str]:
    """Return what messages call each of several adapters: its files, or its place among them."""
    places = [f"adapter {n} of {len(states)}" for n in range(1, 1 + len(states))]
    sources = [getattr(state, "source", "") for state in states]
    names = [repr(s) if s else place for s, place in zip(sources, places, strict=True)]
    return names if len(names) > 1 or any(sources) else ["the adapter"][: len(names)]


def paired(
    one: AdapterState, two: AdapterState, asked: str
) -> Iterator[tuple[str, SiteState | None, SiteState | None]]:
    """Yield the sites of two adapters by name; check base, shapes and finite values."""
    names = _check_adapters([one, two], asked)
    both = [with_every_expert(one), with_every_expert(two)]
    for state, name in zip(both, names, strict=True):
        state.check_finite(f"{asked}, {name}")
        for site in state.sites.values():
            plain(site, f"{asked}, {name}")
    for site_name, held in _by_site(both, names, asked):
        yield site_name, held.get(0), held.get(1)


def _by_site(
    states: Sequence[AdapterState], names: Sequence[str], asked: str
) -> Iterator[tuple[str, dict[int, SiteState]]]:
    """Yield the sites of each name by the numbers of their adapters; refuse unequal shapes."""
    for site in dict.fromkeys(name for state in states for name in state.sites):
        held = {n: state.sites[site] for n, state in enumerate(states) if site in state.sites}
        check_alike([each.spec for each in held.values()], [names[n] for n in held], asked)
        yield site, held


def weighted_sum(
    states: Sequence[AdapterState], weights: Sequence[float], asked: str
) -> AdapterState:
    """Return the exact `sum of weight * adapter`, ranks concatenated."""

    def make(sites: Sequence[Term], like: SiteSpec, holders: Mapping[int, str]) -> SiteState:
        if len(sites) == 1 and sites[0][1] == 1:
            return sites[0][0]
        for (site, _), name in zip(sites, holders.values(), strict=True):
            plain(site, f"{asked}, {name}", bias=True)
        if len(sites) > 1:
            return total(sites, like)
        ((site, weight),) = sites
        spec = replace(site.spec, alpha=site.spec.alpha * abs(weight))
        if not 0 < spec.alpha < math.inf:
            where = f"{asked}, {next(iter(holders.values()))}, site '{spec.name}'"
            problem = f"its alpha would become {spec.alpha}"
            raise StateError(where, problem, "Give a weight nearer to 1")
        turned = {r: t if r[0] == "A" or weight > 0 else -t for r, t in site.tensors.items()}
        return SiteState.of(spec, turned)

    return with_sites(states, weights, make, asked)


def with_sites(
    states: Sequence[AdapterState],
    weights: Sequence[float],
    make: Callable[[Sequence[Term], SiteSpec, Mapping[int, str]], SiteState],
    asked: str,
) -> AdapterState:
    """Return one adapter of several: `make` makes each site; trained tensors are mixed.

    `make` gets the sites with their weights, what the new site is like, and the names of the
    adapters that have it, by their places among all.
    """
    names = _check_adapters(states, asked)
    states = [with_every_expert(state) for state in states]
    for state, weight, name in zip(states, weights, names, strict=True):
        _check_term(state, weight, name, asked)
    terms = [(s.trained, weight) for s, weight in zip(states, weights, strict=True)]
    trained = _mixed(terms, names, asked)
    sites = {}
    for site, held in _by_site(states, names, asked):
        holders = {n: names[n] for n in held}
        # With the base known, kinds of layers are known; for a foreign file they are assumed.
        surest = min(held, key=lambda n: states[n].fingerprint is None)
        like = held[surest].spec
        if any(each.spec.aliases != like.aliases for each in held.values()):
            like = like.at(like.name, like.weight)  # of unequal bases only this name is sure
        made = make([(held[n], weights[n]) for n in held], like, holders)
        bias = f"{made.spec.weight.removesuffix('weight')}bias" if made.spec.lora_bias else ""
        if twice := {made.spec.weight, bias} & trained.keys():
            other = next(n for n, s in zip(names, states, strict=True) if min(twice) in s.trained)
            first = next(iter(holders.values()))
            problem = f"{first} updates '{min(twice)}' and {other} holds a trained copy of it"
            raise StateError(asked, problem, "Merge both adapters into the base instead")
        sites[site] = made
    marks = [state.fingerprint for state in states if state.fingerprint is not None]
    copies = _common_copies([state.base_copies for state in states], names, asked)
    mark = union_of(marks) if marks else None
    layers = next(filter(None, (state.layers for state in states)), "")
    return AdapterState(sites, trained, None, mark, copies, layers=layers)


def _mixed(
    several: Sequence[tuple[Mapping[str, Tensor], float]], names: Sequence[str], asked: str
) -> dict[str, Tensor]:
    """Return trained tensors T mixed by their weights, `W + sum of w (T - W)`.

    W is not known here, so the weights of a tensor must add up to 1: then W cancels out. `names`
    are what messages call the adapters.
    """
    mix = {}
    for key in dict.fromkeys(key for trained, _ in several for key in trained):
        with_it = zip(names, several, strict=True)
        copies = [(n, trained[key], w) for n, (trained, w) in with_it if key in trained]
        where = f"{asked}, trained tensor '{key}'"
        if not math.isclose(sum(weight for *_, weight in copies), 1, rel_tol=1e-9):
            added = " + ".join(f"{weight:g}" for *_, weight in copies)
            raise StateError(
                where,
                f"it is a full copy of the base's tensor, with weight {added}: its change from the "
                "base is not known here",
                "Fold the adapters into the base with `lora-inject merge`, give weights that add "
                "up to 1, or leave it out (select)",
            )
        if len({copy.shape for _, copy, _ in copies}) > 1:
            shapes = " and ".join(f"{list(copy.shape)} in {name}" for name, copy, _ in copies)
            raise StateError(where, f"its shape is {shapes}", "Give adapters of one base")
        mix[key] = copies[0][1]  # a single one as it is
        if len(copies) > 1:
            dtype = reduce(torch.promote_types, (copy.dtype for _, copy, _ in copies))
            products = [weight * copy.detach().double() for _, copy, weight in copies]
            mix[key] = torch.stack(products).sum(0).to(dtype)
    return mix


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
        with within(f"{asked}, {name}"):
            state.check_tensors(StateError)
    _check_one_base([state.fingerprint for state in states], names, asked)
    return names


def _check_one_base(
    several: Iterable[Fingerprint | None], names: Iterable[str], asked: str
) -> None:
    """Refuse adapters of different bases, by the weights that two fingerprints have in common.

    `names` are what messages call the adapters.
    """
    marks = [(mark, name) for mark, name in zip(several, names, strict=True) if mark is not None]
    for (one, first), (two, second) in combinations(marks, 2):
        unknown = {*(one.keys() - two.keys()), *unverifiable(one, two)}
        unknown |= {n for n in one.keys() - unknown if one[n].shape != two[n].shape}
        common = without_weights(one, unknown)  # not where only one of the bases was quantized
        if wrong := base_differences(common, two, ("in one", "in the other")):
            name, what = next(iter(wrong.items()))
            problem = f"they were made on different bases: '{name}' {what}"
            remedy = "Give adapters of one base; where the second was trained after the first was "
            remedy += "merged, combine them with any_base=True"
            raise StateError(f"{asked}, {first} and {second}", problem, remedy)


def _common_copies(
    several: Iterable[Mapping[str, Tensor]], names: Iterable[str], asked: str
) -> dict[str, Tensor]:
    """Return the copies of the base's tensors that any of several adapters carries.

    `names` are what messages call the adapters.
    """
    common: dict[str, Tensor] = {}
    holders: dict[str, str] = {}
    for copies, holder in zip(several, names, strict=True):
        for name, tensor in copies.items():
            held, first = common.setdefault(name, tensor), holders.setdefault(name, holder)
            if not same_values(held, tensor):
                different = f"{first} and {holder} hold different copies of this base tensor"
                raise StateError(f"{asked}, '{name}'", different, "Give adapters of one base")
    return common
