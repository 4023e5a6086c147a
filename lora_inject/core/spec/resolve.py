r"""Which names a config means: from patterns and an inventory of names to a plan of sites.

Matching works only on names and shapes: `resolve` is a pure function of a config and an inventory.
So a plan can be checked, counted and refused before anything changes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

from lora_inject.core.spec.config import (
    ALL_EXPERTS,
    HYPER,
    WORDS,
    Active,
    Config,
    Expect,
    Normal,
    Rule,
)
from lora_inject.core.spec.experts import (
    part_of_stack,
    rank_of_each,
    why_no_experts,
    why_no_stack,
)
from lora_inject.core.spec.inventory import LINEAR_KINDS, Candidate, Inventory
from lora_inject.core.spec.layouts import check_allowed, oriented, sliced
from lora_inject.core.spec.names import (
    Below,
    canonical,
    counted,
    is_bias,
    nearest,
    nearest_names,
    parent,
    quoted,
    templates,
)
from lora_inject.core.spec.patterns import in_layers, matching
from lora_inject.core.spec.plan import Plan, Skipped, Trained
from lora_inject.core.spec.plan_notes import with_notes
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import LayerError, MatchError


def resolve(config: Config, inventory: Inventory, *, to_show: bool = True) -> Plan:
    r"""Find out which sites a config means; `to_show` the plan has ties and notes as well.

    Rules are tried in order and the first that matches a name takes it. A rule matches a module by
    its name or by any of its aliases. Where it matches a module and the module's own weight, the
    module is the site; a pattern that matches the weight alone (`q_proj\.weight`) makes a site of
    the parameter. `all-linear` matches every linear layer but the output head, `all-experts` every
    expert that a router chooses; where a config has both, all-linear leaves the experts out.

    An `exclude` entry takes out what it names *and all that lies below*: `vision_tower` keeps every
    rule off the whole tower, and `lm_head` off `lm_head.weight`, too. It takes out a shared module
    under whichever of its names it matches. It concerns `targets` only, not `train` and `bias`.

    A `train` entry names parameters, or modules, which means all parameters below them. `bias:
    adapted` trains the biases of the modules that have sites; `all` every parameter called `bias`
    or `..._bias`, stacked ones of experts included.

    Examples:
        >>> from lora_inject.core.spec.key_lists import inventory_of
        >>> inventory = inventory_of({f"h.{i}.q.weight": (8, 8) for i in range(2)})
        >>> plan = resolve(Config(targets=["q"], rank=2), inventory)
        >>> plan.n_sites, plan.n_lora
        (2, 64)
    """
    rules = _Rules(config, inventory)
    for i in range(len(config.targets)):
        rules.take(i)
    # Rules are tried in turn, but sites are listed as the model has them.
    ordered = sorted(rules.taken.values(), key=attrgetter("order"))
    sites = tuple(entry.spec for entry in ordered)
    candidates = [entry.candidate for entry in ordered]
    trained: tuple[Trained, ...] = ()
    if config.train or config.tokens or config.bias != "none":
        trained = trained_by(config, inventory, sites, candidates)
    plan = Plan(
        config=config,
        sites=sites,
        trained=trained,
        skipped=tuple(rules.skipped),
        n_base=sum(math.prod(shape) for shape in inventory.parameters.values()),
        assumed=inventory.assumed,
    )
    if to_show:
        plan = with_notes(plan, inventory, candidates)
    if config.expect is not None:
        check_expect(plan, config.expect)
    return plan


# Sites that differ only in their names are made once: what else a site is made of.
_ALIKE = attrgetter(
    *("kind", "in_features", "out_features", "weight_shape", "transposed", "experts"),
    *("needs_layout", "update", "dtype", "active"),
)


class _Taken(NamedTuple):
    order: int
    candidate: Candidate
    spec: SiteSpec


class _Rules:
    """The rules of a config: each takes the names that it matches and no earlier rule took."""

    def __init__(self, config: Config, inventory: Inventory) -> None:
        self.config = config
        self.inventory = inventory
        self.excluded: Excluded | None = None
        if config.exclude:
            self.excluded = Excluded(config, inventory)
        self.taken: dict[str, _Taken] = {}  # by the name of the weight, in the order of rules
        self.skipped: list[Skipped] = []

    def take(self, i: int) -> None:
        """Let rule `i` take its sites; raise if there are none."""
        rule, label = self.config.targets[i], self.config.label(i)
        if self.inventory.assumed and (rule.kind is not None or rule.match in WORDS):
            problem = "a list of keys does not say which kind of layer a tensor belongs to"
            raise MatchError(label, problem, "Give the folder with config.json, or write a pattern")
        names, n_before = self._names(i), len(self.taken)
        left = self._take_each(i, _of_kind(rule.kind, names, self.inventory, label))
        others = _others(names, self.inventory) if rule.kind is None else []
        self.skipped += [Skipped(name, i, self.inventory.reason(name)) for name in others]
        if len(self.taken) == n_before:
            if left:
                who = ", ".join(f"{taker} ({n:,})" for taker, n in left.items())
                remedy = "Put the narrower rule first, or remove this one"
                raise MatchError(label, f"all that it matches is taken by {who}", remedy)
            raise _all_skipped(label, others, self.inventory)

    def _take_each(self, i: int, candidates: Iterable[tuple[int, Candidate]]) -> Counter[str]:
        """Make sites of what nobody took before; return who took how many of the others."""
        rule, label = self.config.filled(self.config.targets[i]), self.config.label(i)
        left: Counter[str] = Counter()
        made: dict[Hashable, SiteSpec] = {}
        for order, candidate in candidates:
            weight = canonical(candidate.weight)
            if taker := self._taker(candidate, weight):
                left[taker] += 1
                if taker == "exclude":
                    self.skipped.append(Skipped(candidate.name, i, "excluded"))
                continue
            if candidate.refusal is not None:
                asked = f"'{candidate.name}', matched by {label}"
                raise LayerError(asked, *candidate.refusal)
            # With `only: FILE` each stack has its own.
            key = candidate if isinstance(rule.only, str) else _ALIKE(candidate)
            if (like := made.get(key)) is None:
                asked = f"'{candidate.name}', matched by {label}"
                like = made[key] = _site(candidate, rule, i, asked)
            spec = like.at(candidate.name, candidate.weight, candidate.aliases)
            self.taken[weight] = _Taken(order, candidate, spec)
        return left

    def _names(self, i: int) -> list[str]:
        """Return the names that a rule matches, in its layers."""
        rule, label, inventory = self.config.targets[i], self.config.label(i), self.inventory
        if rule.match in WORDS:
            names = names_by_word(rule.match, self.config, inventory, label)
        else:
            names = matching(rule.match, inventory.names, asked=label)
        if not names:
            pools = inventory.sites, inventory.names
            raise no_match(inventory, label, rule.match, *pools)
        if rule.layers is None:
            return names
        return in_layers(rule.layers, names, label, inventory.names)

    def _taker(self, candidate: Candidate, weight: str) -> str:
        """Return what took a candidate before: `exclude`, an earlier rule, or nothing."""
        if self.excluded is not None and self.excluded.takes(candidate):
            return "exclude"
        owner = self.taken.get(weight)
        return "" if owner is None else f"rule {(owner.spec.rule or 0) + 1}"


def _candidates(names: Sequence[str], inventory: Inventory) -> Iterator[tuple[int, Candidate]]:
    """Yield the matched candidates, each once: modules, then weights that were matched alone."""
    numbers: dict[int, None] = {}
    for name in names:
        if (number := inventory.sites.get(name)) is not None:
            members = inventory.candidates[number].members
            numbers |= {inventory.sites[member]: None for member in members} or {number: None}
    for parameters in (False, True):
        for number in sorted(numbers):
            if (inventory.candidates[number].kind == "parameter") == parameters:
                yield number, inventory.candidates[number]
    for name in names:
        number = None if name in inventory.sites else inventory.weights.get(name)
        if number is not None and number not in numbers:
            candidate = inventory.candidates[number]
            yield number, candidate.as_parameter(canonical(candidate.weight))


def _of_kind(
    kind: str | None, names: Sequence[str], inventory: Inventory, label: str
) -> list[tuple[int, Candidate]]:
    """Return the matched candidates of a kind, by default all; raise if there are others only."""
    candidates = list(_candidates(names, inventory))
    of_kind = [pair for pair in candidates if kind is None or pair[1].kind == kind]
    if kind is not None and not of_kind:
        kinds = Counter(candidate.kind for _, candidate in candidates)
        there = ", ".join(f"{other} ({n:,})" for other, n in kinds.items()) or "no kind of layer"
        problem = f"nothing that it matches is of kind '{kind}', but of {there}"
        near = nearest(kind, kinds, n=1)
        raise MatchError(label, problem, f"Did you mean '{near[0]}'?" if near else "Correct kind")
    return of_kind


def _others(names: Sequence[str], inventory: Inventory) -> list[str]:
    """Return matched names that are not candidates, without parameters of matched modules."""
    others = [
        name for name in names if name not in inventory.sites and name not in inventory.weights
    ]
    modules = set(names) if others else set()
    return [name for name in others if not (name in inventory.listed and parent(name) in modules)]


def _site(candidate: Candidate, rule: Rule, i: int, asked: str) -> SiteSpec:
    """Make the site that rule `i` asks for, or refuse a layout, slices or rank that do not fit.

    `rule` has the config's values filled in.
    """
    numbers = {key: getattr(rule, key) for key in HYPER}
    if isinstance(rule.init, Normal):
        numbers["init"] = ("normal", rule.init.normal)
    if isinstance(rule.rank, Active):
        numbers["rank"] = rank_of_each(candidate, rule.rank.active, asked)
    if rule.only is not None or rule.share is not None:
        numbers |= part_of_stack(candidate, rule, asked)
    shape, slices = candidate.geometry, None
    if rule.layout is not None or rule.slices is not None or candidate.needs_layout:
        shape = oriented(candidate, rule, asked)
        slices = sliced(candidate, shape, rule, asked)
    site = SiteSpec(
        name=candidate.name,
        kind=candidate.kind,
        slices=slices,
        rule=i,
        weight=candidate.weight,
        update=candidate.update,
        aliases=candidate.aliases,
        **shape._asdict(),
        **numbers,
    )
    check_allowed(site, asked)
    return site


class Excluded:
    """The names that no rule may take, and all below them."""

    def __init__(self, config: Config, inventory: Inventory) -> None:
        excluded: set[str] = set()
        names = list(dict.fromkeys([*inventory.names, *inventory.modules]))
        for i, pattern in enumerate(config.exclude):
            label = f"exclude {i + 1} ('{pattern}')"
            hits = matching(pattern, names, asked=label)
            if not hits:
                raise no_match(inventory, label, pattern, names)
            excluded.update(hits)
        self.names = Below(excluded)

    def takes(self, candidate: Candidate) -> bool:
        """Return whether a candidate, under one of its names, is left out."""
        names = (candidate.name, *candidate.aliases, *candidate.weight_names)
        return any(name in self.names for name in names)


def linear_layers(inventory: Inventory) -> list[str]:
    """Return the names of all linear layers but the output head."""
    linear = (c.name for c in inventory.candidates if c.kind in LINEAR_KINDS)
    return [name for name in linear if name not in inventory.heads]


def names_by_word(word: str, config: Config, inventory: Inventory, label: str) -> list[str]:
    """Return the linear layers, without experts that another rule takes; or the experts."""
    experts = dict.fromkeys(name for mixture in inventory.mixtures for name in mixture.experts)
    if word == ALL_EXPERTS:
        if not experts:
            raise MatchError(label, *why_no_experts(inventory))
        return list(experts)
    words = {rule.match for rule in config.targets}
    left = experts if ALL_EXPERTS in words else ()
    names = [name for name in linear_layers(inventory) if name not in left]
    if not names:
        but = " but its output head" if inventory.heads else ""
        problem = f"the model has no linear layers{but}"
        raise MatchError(label, problem, "Name what to adapt")
    return names


def no_match(inventory: Inventory, asked: str, pattern: str, *pools: Collection[str]) -> MatchError:
    """Return the error for a pattern that matches nothing.

    Suggestions come from the first pool of names that has one; the last pool holds all.
    """
    if buffers := matching(pattern, inventory.buffers, asked=asked):
        problem = f"matches only buffers: {quoted(buffers[:3])}"
        return MatchError(asked, problem, "Name a module or a parameter; buffers do not train")
    problem = f"matched none of {len(pools[-1]):,} names"
    if "experts" in pattern and (hint := why_no_stack(pattern, pools[0])):
        return MatchError(asked, f"{problem}; {hint[0]}", hint[1])
    for pool in pools:
        if near := nearest_names(pattern, pool):
            return MatchError(asked, problem, f"Nearest: {quoted(near)}")
    if some := quoted(list(templates(next(filter(None, pools), ())))[:4]):
        return MatchError(asked, problem, f"Nothing is spelled like it; there is {some}")
    return MatchError(asked, problem, "There is nothing to adapt")


def _all_skipped(label: str, others: Sequence[str], inventory: Inventory) -> MatchError:
    """Return the error of a rule that matches only what cannot be a site."""
    some = ", ".join(f"'{name}' ({inventory.reason(name)})" for name in others[:3])
    more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
    below = Below(others[:1])
    inside = quoted([c.name for c in inventory.candidates if c.name in below][:4])
    in_it = f"Name what is in it: {inside}"
    remedy = in_it if inside else "Name modules or parameters that hold a matrix"
    return MatchError(label, f"matches only what cannot take an adapter: {some}{more}", remedy)


def check_expect(plan: Plan, expect: Expect) -> None:
    """Raise if a plan has other counts than are expected; say how many sites each rule has."""
    counts = {"sites": plan.n_sites, "lora": plan.n_lora, "trainable": plan.n_trainable}
    wanted = {k: n for k, n in expect.model_dump(exclude_none=True).items() if n != counts[k]}
    if not wanted:
        return
    asked = ", ".join(f"{key}: {n:,}" for key, n in wanted.items())
    got = ", ".join(f"{key}: {counts[key]:,}" for key in wanted)
    rules = [
        f"{plan.config.label(i)} {counted(n, 'site')}" for i, n in enumerate(plan.n_sites_by_rule)
    ]
    extra = [f"train and bias {plan.n_trained:,} elements"] if plan.trained else []
    problem = f"found {got} ({'; '.join(rules + extra)})"
    raise MatchError(f"expect {{{asked}}}", problem, "Correct the rules, or the counts")


# ----------------------------------------------------------------- what trains besides the adapters


def trained_by(
    config: Config, inventory: Inventory, sites: Sequence[SiteSpec], candidates: Sequence[Candidate]
) -> tuple[Trained, ...]:
    """Return the parameters that `train`, `bias` and `tokens` name, in model order."""
    shapes = inventory.parameters
    entries = dict[str, Trained]()
    for i, pattern in enumerate(config.train):
        label = f"train {i + 1} ('{pattern}')"
        for name in _matched(pattern, label, inventory):
            entries.setdefault(name, Trained(name, shapes[name], label))
    if config.bias != "none":
        label = f"bias: {config.bias}"
        for name in _biases(config, inventory, candidates):
            entries.setdefault(name, Trained(name, shapes[name], label))
    for pattern, ids in dict(config.tokens).items():
        label = f"tokens '{pattern}'"
        for name in _tables(pattern, ids, label, inventory):
            if name in entries:
                both = f"'{name}' is also named by {entries[name].why}"
                raise MatchError(label, both, "Narrow one of the two patterns")
            entries[name] = Trained(name, (len(ids), *shapes[name][1:]), label, ids)
    if not entries:
        return ()
    _check_not_both(entries, inventory, sites)
    return tuple(entries[name] for name in shapes if name in entries)


def _check_not_both(
    entries: Mapping[str, Trained], inventory: Inventory, sites: Iterable[SiteSpec]
) -> None:
    """Raise for a tensor that is adapted and trained, under whichever of its names it is tied."""
    for site in sites:
        weight = canonical(site.weight)
        entry = entries.get(inventory.listed.get(weight, weight))
        if entry is not None:
            what = f"'{entry.name}' is the weight of the site '{site.name}'"
            remedy = f"Exclude '{site.name}', or narrow the pattern"
            raise MatchError(entry.why, f"{what}: adapted and trained both", remedy)


def _tables(pattern: str, ids: tuple[int, ...], label: str, inventory: Inventory) -> list[str]:
    """Return the matrices that a tokens entry names, which must have these rows."""
    shapes = inventory.parameters
    tables = [name for name in _matched(pattern, label, inventory) if len(shapes[name]) == 2]
    if not tables:
        raise MatchError(label, "it names nothing that has rows", "Name an embedding")
    for name in tables:
        if max(ids) >= shapes[name][0]:
            less = f"'{name}' has no row {max(ids)}: it has {shapes[name][0]:,} rows"
            remedy = "Resize the vocabulary first: model.resize_token_embeddings(n)"
            raise MatchError(label, less, remedy)
    return tables


def _matched(pattern: str, label: str, inventory: Inventory) -> list[str]:
    """Return the listed parameters that an entry names, itself or by a module around them."""
    direct = matching(pattern, inventory.listed, asked=label)
    all_modules = inventory.modules
    modules = matching(pattern, all_modules, asked=label)
    if not direct and not modules:
        raise no_match(inventory, label, pattern, [*inventory.listed, *all_modules])
    below = Below([*direct, *modules])
    hits = dict.fromkeys(first for name, first in inventory.listed.items() if name in below)
    if not hits:
        some = quoted(modules[:3])
        raise MatchError(label, f"matches {some}, with no parameters", "Name what has parameters")
    return list(hits)


def _biases(config: Config, inventory: Inventory, candidates: Sequence[Candidate]) -> list[str]:
    if config.bias == "all":
        names = [name for name in inventory.parameters if is_bias(name)]
        where = f"none of {len(inventory.parameters):,} parameters"
    else:
        modules = dict.fromkeys(candidate.module for candidate in candidates)
        inside: dict[str, list[str]] = {module: [] for module in modules}
        for name in inventory.parameters:
            if (owner := parent(name)) in inside:
                inside[owner].append(name)
        names = [name for listed in inside.values() for name in listed if is_bias(name)]
        where = f"none of {len(modules):,} adapted modules"
    if not names:
        remedy = "Set bias: none" if config.bias == "all" else "Set bias: none, or all"
        raise MatchError(f"bias: {config.bias}", f"{where} is or has a bias", remedy)
    return names
