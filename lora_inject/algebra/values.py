"""Arithmetic on whole adapters as values: sums, truncations, other names and other shapes.

`AdapterState` has the methods; here is what they do. Nothing of it is needed to train, load, save
or merge an adapter, so it is imported when a method is called.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral, Real
from typing import Any, NamedTuple

from torch import Tensor

from lora_inject.algebra import reshape
from lora_inject.algebra.one_base import check_one_base, common_copies
from lora_inject.algebra.parts import (
    Cut,
    Term,
    check_alike,
    compared,
    mixed,
    total,
    truncated,
)
from lora_inject.algebra.plain_sites import plain
from lora_inject.algebra.renaming import distinct, renaming, some_of
from lora_inject.core.adapter.fingerprint import without_weights
from lora_inject.core.adapter.fingerprints import union_of
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.named import named
from lora_inject.core.spec.names import joined
from lora_inject.core.spec.patterns import matching
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import StateError, check_type


def scaled(state: AdapterState, weight: float) -> AdapterState:
    """Return an adapter whose update is multiplied by a number."""
    check_type("multiply an adapter", weight, Real, "Give a number")
    return weighted_sum([state], [float(weight)], f"{weight} * an adapter")


def cosine(one: AdapterState, two: AdapterState) -> float:
    """Return the cosine of the angle between two updates; see `AdapterState.cosine`."""
    sites = [compared(*pair) for _, *pair in paired(one, two, "cosine of adapters")]
    ours, theirs = (math.hypot(*(each.norms[k] for each in sites)) for k in (0, 1))
    return sum(each.dot for each in sites) / (ours * theirs) if ours and theirs else math.nan


def distance(one: AdapterState, two: AdapterState) -> float:
    """Return the Frobenius norm of the difference; see `AdapterState.distance`."""
    pairs = paired(one, two, "distance of adapters")
    return math.hypot(*(compared(*pair).distance for _, *pair in pairs))


def renamed_adapter(
    state: AdapterState, new: Mapping[str, str] | Callable[[str], str]
) -> AdapterState:
    r"""Return the adapter with other names of sites, trained tensors and the fingerprint.

    Args:
        state: The adapter.
        new: Regexes of whole segments and their replacements (`\1` for a group, empty to
            remove them), applied in order to every name; or a function of a name.

    Raises:
        StateError: A regex is not valid or matches no name, two names would become one, or a
            new name is empty or has spaces or slashes.

    Examples:
        >>> import torch
        >>> spec = SiteSpec("h.0.q", "linear", 4, 6, (6, 4), 2, 4.0, weight="h.0.q.weight")
        >>> a = AdapterState({"h.0.q": SiteState(spec, torch.ones(2, 4), torch.ones(6, 2))})
        >>> site = a.rename({"h": "model.layers", "q": "self_attn.q_proj"}).sites
        >>> [site.spec.weight for site in site.values()]
        ['model.layers.0.self_attn.q_proj.weight']
    """
    change = renaming(new, [*state.sites, *state.trained])
    sites, weights = [], {}
    for name, site in state.sites.items():
        spec = reshape.renamed(site.spec, change(name))
        weights[site.spec.weight] = spec.weight
        sites.append((spec.name, replace(site, spec=spec)))

    def place(name: str) -> str:
        return weights.get(name) or change(name)

    marks = state.fingerprint
    return replace(
        state,
        sites=distinct(sites),
        trained=distinct((place(name), tensor) for name, tensor in state.trained.items()),
        base_copies=distinct((place(name), t) for name, t in state.base_copies.items()),
        rows={place(name): rows for name, rows in state.rows.items()},
        fingerprint=marks and {place(name): known for name, known in marks.items()},
        config=None,
    )


def split_adapter(
    state: AdapterState, pattern: str, sizes: Mapping[str, int] | None = None
) -> AdapterState:
    """Split fused projections: `attn.qkv` becomes `attn.q`, `attn.k` and `attn.v`.

    Args:
        state: The adapter.
        pattern: Which sites, as in a config.
        sizes: Width of each part along the output, in order; those of its slices by default.

    Returns:
        A site for each adapted part, under the parent of the fused one.

    Raises:
        StateError: The pattern matches nothing, or the widths do not fit the site.
    """
    asked, sizes = f"split {pattern!r}", {} if sizes is None else sizes
    _check_sizes(asked, sizes)
    chosen = named(state.sites, [pattern], asked)
    sites = {name: plain(state.sites[name], asked) for name in chosen}
    return _with(state, {n: reshape.split(s, sizes, asked) for n, s in sites.items()})


def joined_adapter(state: AdapterState, name: str, sizes: Mapping[str, int]) -> AdapterState:
    """Join sites of one parent to sites on fused projections.

    Args:
        state: The adapter.
        name: Name of the fused layer, such as `qkv_proj`.
        sizes: Name and width of each of its parts, in order: `{"q_proj": 8, "k_proj": 4}`.

    Returns:
        One site with slices for each module that holds some of the parts. Ranks are padded with
        zeros to the largest.

    Raises:
        StateError: No site is such a part, or a width does not fit.
    """
    asked = f"join {name!r}"
    check_type(f"{asked}, name", name, str, "Give the name of the fused layer")
    _check_sizes(asked, sizes)
    groups: dict[str, dict[str, str]] = {}
    for site in state.sites:
        for part in sizes:
            if f".{site}".endswith(f".{part}"):
                head = site.removesuffix(part).rstrip(".")
                groups.setdefault(joined(head, name), {})[part] = site
    put = partial(reshape.join, sizes=sizes, asked=asked)
    return _joined(state, groups, put, asked, f"no site ends in {' or '.join(sizes)}")


def adapter_of_experts(state: AdapterState, pattern: str) -> AdapterState:
    """Split stacks of experts: `experts.up` becomes `experts.0.up`, `experts.1.up`, ...

    Args:
        state: The adapter.
        pattern: Which sites, as in a config.

    Returns:
        A linear site for each expert.

    Raises:
        StateError: The pattern matches nothing, or a site that is not a stack.
    """
    asked = f"split_experts {pattern!r}"
    new = {}
    for name in named(state.sites, [pattern], asked):
        site = plain(state.sites[name], asked)
        if site.spec.experts is None:
            raise StateError(asked, f"'{name}' is not a stack of experts", "Match stacks only")
        new[name] = reshape.split_experts(site)
    return _with(state, new)


def adapter_of_stacks(state: AdapterState, pattern: str, n: int) -> AdapterState:
    """Join the sites of single experts to stacks: `experts.0.up`, ... become `experts.up`.

    Args:
        state: The adapter.
        pattern: Which modules hold numbered experts, as in a config.
        n: How many experts there are; one without a site gets zeros.

    Returns:
        A site on a stacked parameter `(n, out, in)` for each kind of layer.

    Raises:
        StateError: No site is such an expert, or they do not fit on one stack.
    """
    asked = f"join_experts {pattern!r}"
    check_type(f"{asked}, pattern", pattern, str, "Give a regex for the end of a name")
    check_type(f"{asked}, n", n, Integral, "Give the number of experts")
    stacks: dict[str, dict[int, str]] = {}
    for name in state.sites:
        for number in re.finditer(r"\.(\d+)\.", name):
            head, end = name[: number.start()], name[number.end() :]
            if matching(pattern, [head], asked=asked, error=StateError):
                stacks.setdefault(joined(head, end), {})[int(number[1])] = name
    if over := [name for group in stacks.values() for e, name in group.items() if e >= n]:
        raise StateError(asked, f"'{over[0]}' is beyond {n} experts", "Correct n")
    put = partial(reshape.join_experts, n=n, asked=asked)
    return _joined(state, stacks, put, asked, "no site is in a numbered module there")


def _joined(
    state: AdapterState,
    groups: Mapping[str, Mapping[Any, str]],
    put: Callable[[str, Mapping[Any, SiteState]], SiteState],
    asked: str,
    why: str,
) -> AdapterState:
    """Return the adapter with one site, under its name in `groups`, for each group."""
    if not groups:
        raise StateError(asked, why, f"Its sites are such as {some_of(state.sites)}")
    new: dict[str, Mapping[str, SiteState]] = {}
    for name, group in groups.items():
        first, *others = group.values()
        members = {part: plain(state.sites[old], asked) for part, old in group.items()}
        new |= {first: {name: put(name, members)}, **{old: {} for old in others}}
    return _with(state, new)


def _with(state: AdapterState, new: Mapping[str, Mapping[str, SiteState]]) -> AdapterState:
    """Return the adapter with new sites in the place of some, whose fingerprints go."""
    sites = [
        item for name, site in state.sites.items() for item in new.get(name, {name: site}).items()
    ]
    gone = {state.sites[name].spec.weight for name in new}
    marks = without_weights(state.fingerprint or {}, gone) or None
    return replace(state, sites=distinct(sites), fingerprint=marks, config=None)


class Truncated(NamedTuple):
    """The result of `lora_inject.truncate`.

    Attributes:
        state: The adapter.
        sites: For each site its rank before and now, and the relative error.
    """

    state: AdapterState
    sites: dict[str, Cut]


def truncation(state: AdapterState, rank: int | None, energy: float | None) -> Truncated:
    """Return the truncated adapter, with rank and error of each site; see `truncate`."""
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


def truncated_state(state: AdapterState, rank: int | None, energy: float | None) -> AdapterState:
    """Return the truncated adapter; see `AdapterState.truncate`."""
    return truncation(state, rank, energy).state


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
    one, two = one.whole, two.whole
    for state, name in zip((one, two), names, strict=True):
        replace(state, sites={}).check_finite(f"{asked}, {name}")
    for site in {**one.sites, **two.sites}:
        sites_of_both: list[SiteState | None] = []
        for state, name in zip((one, two), names, strict=True):
            sites_of_both.append(state.sites.get(site) and state.sites[site].mapped(_read))
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
    states = [state.whole for state in states]
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


def _check_sizes(asked: str, sizes: Mapping[str, int]) -> None:
    remedy = "Give a dict from the name of each part to its width"
    check_type(f"{asked}, sizes", sizes, Mapping, remedy)
    for part, width in sizes.items():
        check_type(f"{asked}, the width of {part!r}", width, Integral, remedy)
        if width < 1:
            raise StateError(asked, f"the width of {part!r} is {width}", "Give 1 or more")
