r"""Which names a config means: from patterns and an inventory of names to a plan of sites.

Matching works only on names and shapes: `resolve` is a pure function of a config and an inventory.
So a plan can be checked, counted and refused before anything changes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

from lora_inject.core.spec import unmatched
from lora_inject.core.spec.below import Below, modules_of
from lora_inject.core.spec.config import HYPER, WORDS, Active, Config, Expect, Normal, Rule
from lora_inject.core.spec.experts import part_of_stack, rank_of_each
from lora_inject.core.spec.inventory import Candidate, Inventory
from lora_inject.core.spec.layer_ranges import inside
from lora_inject.core.spec.layouts import oriented, sliced
from lora_inject.core.spec.limits import reasons_against
from lora_inject.core.spec.names import canonical, counted, parent
from lora_inject.core.spec.patterns import matching
from lora_inject.core.spec.plan import Plan, Skipped, with_notes
from lora_inject.core.spec.rule_words import names_by_word
from lora_inject.core.spec.sites import FROM_WEIGHT, SiteSpec
from lora_inject.core.spec.trained import Trained, trained_by
from lora_inject.core.spec.unmatched import no_match
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
        plan = with_notes(plan, inventory, candidates, rules.forms)
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
        self.forms: list[SiteSpec] = []  # one of all sites that differ only in their names
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
                raise unmatched.all_gone(label, left)
            raise unmatched.all_skipped(label, others, self.inventory)

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
                self.forms.append(like)
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
            raise unmatched.no_match(inventory, label, rule.match, *pools)
        if rule.layers is None:
            return names
        return inside(rule.layers, names, label, inventory.names)

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
        raise unmatched.no_kind(label, kind, Counter(candidate.kind for _, candidate in candidates))
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
    if site.variant != "lora" or site.lora_bias or site.init in FROM_WEIGHT or site.dropout:
        for reason in reasons_against(site):
            raise MatchError(asked, *reason)
    return site


class Excluded:
    """The names that no rule may take, and all below them."""

    def __init__(self, config: Config, inventory: Inventory) -> None:
        excluded: set[str] = set()
        names = list(dict.fromkeys([*inventory.names, *modules_of(inventory)]))
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
