r"""Which names a config means: from patterns and an inventory of names to a plan of sites.

Matching works on names and shapes alone: `resolve` is a pure function of a config and an inventory,
so whatever can be planned can be checked, counted and refused before anything changes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from lora_inject.errors import LayerError, MatchError, nearest
from lora_inject.spec.config import ALL_LINEAR, Config
from lora_inject.spec.fit import fit, notes
from lora_inject.spec.inventory import Candidate, Inventory
from lora_inject.spec.names import (
    Below,
    canonical,
    counted,
    first_number,
    is_bias,
    matching,
    nearest_names,
    parent,
    quoted,
    templates,
)
from lora_inject.spec.plan import Plan, Skipped, Tied, Trained
from lora_inject.spec.sites import SiteSpec

LINEAR_KINDS = ("linear", "conv1d")


def resolve(config: Config, inventory: Inventory) -> Plan:
    r"""Find out which sites a config means.

    Rules are tried in order and the first that matches a name takes it. A rule matches a module by
    its name or by any of its aliases. Where it matches a module and the module's own weight, the
    module is the site; a pattern that matches the weight alone (`q_proj\.weight`) makes a site of
    the parameter. `all-linear` matches every linear layer but the output head.

    An `exclude` entry takes out what it names *and all that lies below*: `vision_tower` keeps every
    rule off the whole tower, and `lm_head` off `lm_head.weight`, too. It takes out a shared module
    under whichever of its names it matches. It concerns `targets` only, not `train` and `bias`.

    A `train` entry names parameters, or modules, which means all parameters below them. `bias:
    adapted` trains the biases of the modules that have sites; `all` every parameter called `bias`
    or `..._bias`, stacked ones of experts included.

    Args:
        config: The config.
        inventory: The names there are.

    Returns:
        The plan.

    Raises:
        MatchError: A pattern matches nothing, or nothing that it could take; a layout or slices do
            not fit; a weight would be adapted and trained; `expect` is missed.
        LayerError: A rule matches something that cannot take an adapter.

    Example:
        >>> inventory = Inventory.from_keys({f"h.{i}.q.weight": (8, 8) for i in range(2)})
        >>> plan = resolve(Config(targets=["q"], rank=2), inventory)
        >>> plan.n_sites, plan.n_lora
        (2, 64)
    """
    rules = _Rules(config, _Index(inventory))
    for i in range(len(config.targets)):
        rules.take(i)
    # Rules are tried in turn, but sites are listed as the model has them.
    ordered = sorted(rules.taken.values(), key=lambda entry: entry.order)
    sites = tuple(entry.spec for entry in ordered)
    found = [entry.candidate for entry in ordered]
    trained = _trained(config, rules.index, sites, found)
    plan = Plan(
        config=config,
        sites=sites,
        trained=trained,
        skipped=tuple(rules.skipped),
        tied=_tied(rules.index, sites, found, trained),
        notes=(*_head_notes(config, inventory), *notes(found, sites)),
        n_base=sum(math.prod(shape) for shape in inventory.parameters.values()),
        assumed=inventory.assumed,
    )
    _check_expect(plan)
    return plan


class _Index:
    """The inventory by name: what each name means.

    Attributes:
        inventory: The inventory.
        candidates: Its candidates.
        sites: Names and aliases of candidates, with the candidate's number.
        weights: Names of the weights of modules, with the candidate's number.
        names: Every name that a rule can match.
    """

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.candidates = inventory.candidates
        self.sites = {candidate.name: i for i, candidate in enumerate(self.candidates)}
        self.weights: dict[str, int] = {}
        for i, candidate in enumerate(self.candidates):
            for alias in candidate.aliases:
                self.sites.setdefault(alias, i)
            if candidate.kind != "parameter" and candidate.weight:
                self.weights.update(dict.fromkeys(self.weight_names(candidate), i))
        self.names = dict.fromkeys(self.sites)
        for names in (self.weights, inventory.others, inventory.parameters, inventory.aliases):
            self.names.update(dict.fromkeys(names))

    @staticmethod
    def weight_names(candidate: Candidate) -> list[str]:
        """Names of the weight of a module, the canonical one first."""
        weight = canonical(candidate.weight)
        if not candidate.aliases:
            return [weight]
        tail = weight.removeprefix(candidate.name)
        return [weight, *(alias + tail for alias in candidate.aliases)]

    def reason(self, name: str) -> str:
        """Why a name is no candidate."""
        inventory = self.inventory
        if name in inventory.others:
            return inventory.others[name]
        name = inventory.aliases.get(name, name)
        return "bias" if is_bias(name) else f"{len(inventory.parameters[name])}-d parameter"

    @cached_property
    def modules(self) -> list[str]:
        """Names of all modules, containers included."""
        tensors = (self.parameters, self.weights)
        names = dict.fromkeys(n for n in self.names if not any(n in t for t in tensors))
        for name in (*self.names, *self.parameters):
            module = parent(name)
            while module and module not in names:
                names[module] = None
                module = parent(module)
        return list(names)

    @cached_property
    def parameters(self) -> dict[str, str]:
        """Every name of a parameter with the one under which the inventory lists it."""
        listed = self.inventory.parameters
        names = {**{name: name for name in listed}, **self.inventory.aliases}
        for candidate in self.candidates:
            plain = not candidate.tied and not candidate.aliases
            if not candidate.weight or (plain and candidate.weight in names):
                continue
            weights = self.weight_names(candidate)
            same = (*weights, *map(canonical, candidate.tied))
            first = next((name for name in same if name in listed), None)
            if first is not None:
                names.update((name, first) for name in same if name not in names)
        for candidate in self.candidates:
            for name in self.children.get(candidate.name, ()) if candidate.aliases else ():
                tail = name.removeprefix(candidate.name)
                names.update((alias + tail, name) for alias in candidate.aliases)
        return names

    @cached_property
    def children(self) -> dict[str, list[str]]:
        """Listed parameters by the module that owns them."""
        children: dict[str, list[str]] = {}
        for name in self.inventory.parameters:
            children.setdefault(parent(name), []).append(name)
        return children


class _Taken(NamedTuple):
    order: int
    candidate: Candidate
    spec: SiteSpec


class _Rules:
    """The rules of a config at work: each takes what it matches and no earlier rule has.

    Attributes:
        config: The config.
        index: The names.
        taken: Sites by the name of their weight, in the order of rules.
        skipped: What else the rules matched.
    """

    def __init__(self, config: Config, index: _Index) -> None:
        self.config = config
        self.index = index
        self.excluded = _excluded(config, index)
        self.taken: dict[str, _Taken] = {}
        self.skipped: list[Skipped] = []

    def take(self, i: int) -> None:
        """Let rule `i` take its sites; raise if there are none."""
        rule, label = self.config.targets[i], _rule_label(self.config, i)
        names = self._names(i)
        candidates = list(_candidates(names, self.index))
        kinds = Counter(candidate.kind for _, candidate in candidates)
        if rule.kind is not None:
            candidates = [pair for pair in candidates if pair[1].kind == rule.kind]
            if not candidates:
                raise _no_kind(label, rule.kind, kinds)
        left: Counter[str] = Counter()
        before, made = len(self.taken), dict[Candidate, SiteSpec]()
        for order, candidate in candidates:
            if taker := self._taker(candidate):
                left[taker] += 1
                if taker == "exclude":
                    self.skipped.append(Skipped(candidate.name, i, "excluded"))
                continue
            asked = f"'{candidate.name}', matched by {label}"
            if candidate.refusal is not None:
                raise LayerError(asked, *candidate.refusal)
            # Sites that differ only in their names are made once.
            key = candidate._replace(name="", weight="", owner="", aliases=(), tied=())
            if (like := made.get(key)) is None:
                hyper = self.config.hyper(rule)
                like = made[key] = fit(candidate, rule, i, hyper, asked)
            spec = like.at(candidate.name, candidate.weight, candidate.aliases)
            self.taken[canonical(candidate.weight)] = _Taken(order, candidate, spec)
        others = _others(names, self.index) if rule.kind is None else []
        self.skipped += [Skipped(name, i, self.index.reason(name)) for name in others]
        if len(self.taken) == before:
            raise _all_gone(label, left) if left else _all_skipped(label, others, self.index)

    def _names(self, i: int) -> list[str]:
        """Return the names that a rule matches, in its layers."""
        rule, label, index = self.config.targets[i], _rule_label(self.config, i), self.index
        if rule.match == ALL_LINEAR:
            heads = index.inventory.heads or ()
            linear = [c.name for c in index.candidates if c.kind in LINEAR_KINDS]
            names = [name for name in linear if name not in heads]
            if not names:
                found = "the model has no linear layers" + (
                    " but its output head" if linear else ""
                )
                raise MatchError(label, found, "Name what to adapt")
        else:
            names = matching(rule.match, index.names, asked=label)
            if not names:
                raise _no_match(label, rule.match, [list(index.sites), list(index.names)], index)
        inside = [name for name in names if rule.covers(first_number(name))]
        if not inside:
            numbers = [n for name in names if (n := first_number(name)) is not None]
            found = f"nothing that it matches lies in layers {', '.join(rule.layers or ())}"
            span = f"Its layers are {min(numbers)} to {max(numbers)}" if numbers else ""
            raise MatchError(label, found, span or "Remove layers; no name that it matches has one")
        return inside

    def _taker(self, candidate: Candidate) -> str:
        """Return who took a candidate before: `exclude`, an earlier rule, or nobody."""
        if self.config.exclude:
            names = (candidate.name, *candidate.aliases, *self.index.weight_names(candidate))
            if any(name in self.excluded for name in names):
                return "exclude"
        owner = self.taken.get(canonical(candidate.weight))
        return "" if owner is None else f"rule {(owner.spec.rule or 0) + 1}"


def _rule_label(config: Config, i: int) -> str:
    return f"rule {i + 1} ('{config.targets[i].match}')"


def _excluded(config: Config, index: _Index) -> Below:
    """Return the names that no rule may take, and all below them."""
    excluded: set[str] = set()
    names = list(dict.fromkeys([*index.names, *index.modules])) if config.exclude else []
    for i, pattern in enumerate(config.exclude):
        label = f"exclude {i + 1} ('{pattern}')"
        found = matching(pattern, names, asked=label)
        if not found:
            raise _no_match(label, pattern, [names], index)
        excluded.update(found)
    return Below(excluded)


def _candidates(names: Sequence[str], index: _Index) -> Iterator[tuple[int, Candidate]]:
    """Yield the matched candidates, each once: modules, then weights that were matched alone."""
    numbers: dict[int, None] = {}
    for name in names:
        if (number := index.sites.get(name)) is not None:
            members = [index.sites[member] for member in index.candidates[number].members]
            numbers.update(dict.fromkeys(members or [number]))
    for number in sorted(numbers, key=lambda n: (index.candidates[n].kind == "parameter", n)):
        yield number, index.candidates[number]
    for name in names:
        number = None if name in index.sites else index.weights.get(name)
        if number is not None and number not in numbers:
            candidate = index.candidates[number]
            yield number, candidate.as_parameter(canonical(candidate.weight))


def _others(names: Sequence[str], index: _Index) -> list[str]:
    """Return matched names that are no candidates, without parameters of matched modules."""
    others = [name for name in names if name not in index.sites and name not in index.weights]
    modules = set(names) if others else set()
    return [name for name in others if not (name in index.parameters and parent(name) in modules)]


# Rules that take nothing


def _no_match(
    label: str, pattern: str, pools: Sequence[Sequence[str]], index: _Index
) -> MatchError:
    if buffers := matching(pattern, index.inventory.buffers, asked=label):
        found = f"matches only buffers: {quoted(buffers[:3])}"
        return MatchError(label, found, "Name a module or a parameter; buffers do not train")
    found = f"matched none of {len(pools[-1]):,} names"
    for pool in pools:
        if near := nearest_names(pattern, pool):
            return MatchError(label, found, f"Nearest: {quoted(near)}")
    some = next((pool for pool in pools if pool), ())
    remedy = f"Nothing is spelled like it; there is {quoted(list(templates(some))[:4])}"
    return MatchError(label, found, remedy if some else "The model has nothing to adapt")


def _no_kind(label: str, kind: str, kinds: Counter[str]) -> MatchError:
    near = nearest(kind, kinds, n=1)
    there = ", ".join(f"{kind} ({n:,})" for kind, n in kinds.items()) or "no kind of layer"
    found = f"nothing that it matches is of kind '{kind}', but of {there}"
    return MatchError(label, found, f"Did you mean '{near[0]}'?" if near else "Correct kind")


def _all_gone(label: str, left: Counter[str]) -> MatchError:
    who = ", ".join(f"{taker} ({n:,})" for taker, n in left.items())
    found = f"all that it matches is taken by {who}"
    return MatchError(label, found, "Put the narrower rule first, or remove this one")


def _all_skipped(label: str, others: Sequence[str], index: _Index) -> MatchError:
    some = ", ".join(f"'{name}' ({index.reason(name)})" for name in others[:3])
    more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
    below = Below(others[:1])
    inside = [c.name for c in index.candidates if c.name in below]
    remedy = "Name modules or parameters that hold a matrix"
    if inside:
        remedy = f"Name what lies in it: {quoted(inside[:4])}"
    return MatchError(label, f"matches only what cannot take an adapter: {some}{more}", remedy)


# What else trains


def _trained(
    config: Config, index: _Index, sites: Sequence[SiteSpec], found: Sequence[Candidate]
) -> tuple[Trained, ...]:
    why: dict[str, str] = {}
    for i, pattern in enumerate(config.train):
        label = f"train {i + 1} ('{pattern}')"
        for name in _parameters_hit(pattern, label, index):
            why.setdefault(name, label)
    if config.bias != "none":
        label = f"bias: {config.bias}"
        for name in _biases(config, index, found):
            why.setdefault(name, label)
    if not why:
        return ()
    _check_not_both(why, index, sites)
    shapes = index.inventory.parameters
    return tuple(Trained(name, shapes[name], why[name]) for name in shapes if name in why)


def _check_not_both(why: Mapping[str, str], index: _Index, sites: Sequence[SiteSpec]) -> None:
    """Refuse to train a tensor that a site adapts, tied names included."""
    for site in sites:
        weight = canonical(site.weight)
        name = index.parameters.get(weight, weight)
        if name in why:
            found = f"'{name}' is the weight of the site '{site.name}': adapted and trained both"
            raise MatchError(why[name], found, f"Exclude '{site.name}', or narrow the pattern")


def _parameters_hit(pattern: str, label: str, index: _Index) -> list[str]:
    """Listed parameters that a train entry names, itself or by a module around them."""
    direct = matching(pattern, index.parameters, asked=label)
    modules = matching(pattern, index.modules, asked=label)
    if not direct and not modules:
        names = [*index.parameters, *index.modules]
        raise _no_match(label, pattern, [names], index)
    below = Below([*direct, *modules])
    found = dict.fromkeys(first for name, first in index.parameters.items() if name in below)
    if not found:
        some = quoted(modules[:3])
        raise MatchError(label, f"matches {some}, with no parameters", "Name what has parameters")
    return list(found)


def _biases(config: Config, index: _Index, found: Sequence[Candidate]) -> list[str]:
    if config.bias == "all":
        names = [name for name in index.inventory.parameters if is_bias(name)]
        where = f"none of {len(index.inventory.parameters):,} parameters"
    else:
        modules = dict.fromkeys(candidate.module for candidate in found)
        names = [n for m in modules for n in index.children.get(m, ()) if is_bias(n)]
        where = f"none of {len(modules):,} adapted modules"
    if not names:
        remedy = "Set bias: none" if config.bias == "all" else "Set bias: none, or all"
        raise MatchError(f"bias: {config.bias}", f"{where} is or has a bias", remedy)
    return names


# What to know, and what was expected


def _tied(
    index: _Index,
    sites: Sequence[SiteSpec],
    found: Sequence[Candidate],
    trained: Sequence[Trained],
) -> tuple[Tied, ...]:
    """Tensors with several names that the plan touches, each once."""
    names = {entry.name for entry in trained}
    on: dict[tuple[str, ...], list[str]] = {}
    for site, candidate in zip(sites, found, strict=True):
        if candidate.tied:
            on.setdefault(_all_names(candidate), []).append(site.name)
    for candidate in index.candidates if names else ():
        if candidate.tied and names.intersection(_all_names(candidate)):
            on.setdefault(_all_names(candidate), [])
    return tuple(
        Tied(same, tuple(site_names), bool(names.intersection(same)))
        for same, site_names in on.items()
    )


def _all_names(candidate: Candidate) -> tuple[str, ...]:
    return tuple(sorted({canonical(candidate.weight), *map(canonical, candidate.tied)}))


def _head_notes(config: Config, inventory: Inventory) -> Iterator[str]:
    """Say which layer `all-linear` took for the output head."""
    if all(rule.match != ALL_LINEAR for rule in config.targets):
        return
    if inventory.heads is None:
        yield "all-linear takes every linear layer: a list of keys does not say which is the head"
    elif inventory.heads:
        yield f"all-linear leaves out the output head {quoted(inventory.heads)}"
    else:
        yield "all-linear takes every linear layer: the model states no output head"


def _check_expect(plan: Plan) -> None:
    expect = plan.config.expect
    if expect is None:
        return
    counts = {"sites": plan.n_sites, "lora": plan.n_lora, "trainable": plan.n_trainable}
    wanted = {name: getattr(expect, name) for name in counts}
    missed = [n for n in counts if wanted[n] is not None and wanted[n] != counts[n]]
    if not missed:
        return
    asked = ", ".join(f"{n}: {wanted[n]:,}" for n in missed)
    got = ", ".join(f"{n}: {counts[n]:,}" for n in missed)
    rules = [
        f"{_rule_label(plan.config, i)} {counted(n, 'site')}"
        for i, n in enumerate(plan.n_sites_by_rule)
    ]
    extra = [f"train and bias {plan.n_trained:,} elements"] if plan.trained else []
    found = f"found {got} ({'; '.join(rules + extra)})"
    raise MatchError(f"expect {{{asked}}}", found, "Correct the rules, or the counts")
