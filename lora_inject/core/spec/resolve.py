r"""Which names a config means: from patterns and an inventory of names to a plan of sites.

Matching works only on names and shapes: `resolve` is a pure function of a config and an inventory.
So a plan can be checked, counted and refused before anything changes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter

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
from lora_inject.core.spec.inventory import LINEAR_KINDS, Candidate, Inventory
from lora_inject.core.spec.layouts import (
    check_allowed,
    oriented,
    part_of_stack,
    rank_of_each,
    sliced,
    why_no_experts,
)
from lora_inject.core.spec.names import (
    Below,
    canonical,
    counted,
    is_bias,
    meant,
    nearest,
    parent,
    quoted,
    templates,
)
from lora_inject.core.spec.patterns import Names
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
        >>> names = [f"h.{i}.q" for i in range(2)]
        >>> layers = [Candidate(n, "linear", 8, 8, (8, 8), f"{n}.weight") for n in names]
        >>> plan = resolve(Config(targets=["q"], rank=2), Inventory(tuple(layers), {}, {}))
        >>> plan.n_sites, plan.n_lora
        (2, 64)
    """
    kept_off: set[str] = set()
    for i, pattern in enumerate(config.exclude):
        kept_off.update(
            _named(pattern, f"exclude {i + 1} ('{pattern}')", inventory.names, inventory)
        )
    taken: dict[int, tuple[Candidate, SiteSpec]] = {}
    skipped: list[Skipped] = []
    for i in range(len(config.targets)):
        skipped += _take(i, config, inventory, kept_off, taken)
    # Rules are tried in turn, but sites are listed as the model has them.
    ordered = [taken[number] for number in sorted(taken)]
    sites = tuple(spec for _, spec in ordered)
    candidates = [candidate for candidate, _ in ordered]
    plan = Plan(
        config=config,
        sites=sites,
        trained=_trained(config, inventory, sites, candidates),
        skipped=tuple(skipped),
        n_base=sum(math.prod(shape) for shape in inventory.parameters.values()),
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


def _take(
    i: int,
    config: Config,
    inventory: Inventory,
    kept_off: Collection[str],
    taken: dict[int, tuple[Candidate, SiteSpec]],
) -> list[Skipped]:
    """Let rule `i` take what it matches and nobody took before; raise if that is nothing.

    `taken` is by the candidate's number: no tensor gets two sites. Returns what else it matches.
    """
    rule, label = config.filled(config.targets[i]), config.label(i)
    names = _names(rule, label, config, inventory)
    n_before, left, skipped = len(taken), Counter[str](), list[Skipped]()
    made: dict[Hashable, SiteSpec] = {}
    for number, candidate in _of_kind(rule.kind, names, inventory, label):
        if kept_off and any(name in kept_off for name in candidate.all_names):
            left["exclude"] += 1
            skipped.append(Skipped(candidate.name, i, "excluded"))
        elif number in taken:
            left[f"rule {(taken[number][1].rule or 0) + 1}"] += 1
        else:
            if candidate.refusal is not None:
                raise LayerError(f"'{candidate.name}', matched by {label}", *candidate.refusal)
            key = _ALIKE(candidate)
            if key not in made:
                made[key] = _site(candidate, rule, i, f"'{candidate.name}', matched by {label}")
            spec = made[key].at(candidate.name, candidate.weight, candidate.aliases)
            taken[number] = candidate, spec
    if len(taken) == n_before:
        if left:
            who = ", ".join(f"{taker} ({n:,})" for taker, n in left.items())
            remedy = "Put the narrower rule first, or remove this one"
            raise MatchError(label, f"all that it matches is taken by {who}", remedy)
        raise _all_skipped(label, _others(names, inventory), inventory)
    others = [] if rule.kind is not None else _others(names, inventory)
    return [*skipped, *(Skipped(name, i, inventory.reason(name)) for name in others)]


def _names(rule: Rule, label: str, config: Config, inventory: Inventory) -> list[str]:
    """Return the names that a rule matches, in its layers."""
    if rule.match in WORDS:
        names = _by_word(rule.match, config, inventory, label)
    else:
        names = inventory.pool.matching(rule.match, label)
        if not names:
            raise _no_match(inventory, label, rule.match, inventory.sites, inventory.names)
    if rule.layers is None:
        return names
    return inventory.layers.only(rule.layers, names, label)


def _by_word(word: str, config: Config, inventory: Inventory, label: str) -> list[str]:
    """Return the linear layers, without experts that another rule takes; or the experts."""
    experts = dict.fromkeys(name for mixture in inventory.mixtures for name in mixture.experts)
    if word == ALL_EXPERTS:
        if not experts:
            raise MatchError(label, *why_no_experts(inventory))
        return list(experts)
    left = experts if any(rule.match == ALL_EXPERTS for rule in config.targets) else ()
    names = [name for name in linear_layers(inventory) if name not in left]
    if not names:
        but = " but its output head" if inventory.heads else ""
        problem = f"the model has no linear layers{but}"
        raise MatchError(label, problem, "Name what to adapt")
    return names


def linear_layers(inventory: Inventory) -> list[str]:
    """Return the names of all linear layers but the output head."""
    linear = (c.name for c in inventory.candidates if c.kind in LINEAR_KINDS)
    return [name for name in linear if name not in inventory.heads]


def _candidates(names: Sequence[str], inventory: Inventory) -> Iterator[tuple[int, Candidate]]:
    """Yield the matched candidates, each once: modules, then weights that were matched alone."""
    sites, candidates, matched = inventory.sites, inventory.candidates, set[int]()
    for name in names:
        if (number := sites.get(name)) is not None:
            if members := candidates[number].members:
                matched.update(sites[member] for member in members)
            else:
                matched.add(number)
    pairs = [(number, candidates[number]) for number in sorted(matched)]
    yield from (pair for pair in pairs if pair[1].kind != "parameter")
    yield from (pair for pair in pairs if pair[1].kind == "parameter")
    for name in names:
        number = None if name in sites else inventory.weights.get(name)
        if number is not None and number not in matched:
            candidate = candidates[number]
            yield number, candidate.as_parameter(candidate.weight)


def _of_kind(
    kind: str | None, names: Sequence[str], inventory: Inventory, label: str
) -> list[tuple[int, Candidate]]:
    """Return the matched candidates of a kind, by default all; raise if there are others only."""
    candidates = list(_candidates(names, inventory))
    of_kind = [pair for pair in candidates if kind is None or pair[1].kind == kind]
    if kind is not None and candidates and not of_kind:
        kinds = Counter(candidate.kind for _, candidate in candidates)
        there = ", ".join(f"{other} ({n:,})" for other, n in kinds.items())
        problem = f"nothing that it matches is of kind '{kind}', but of {there}"
        raise MatchError(label, problem, meant(kind, kinds))
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


def _named(pattern: str, label: str, names: Collection[str], inventory: Inventory) -> list[str]:
    """Return the names that an entry means: those that it ends, and what lies below."""
    if hits := inventory.under(pattern, names, label):
        return hits
    if some := quoted(inventory.known.matching(pattern, label)[:3]):
        raise MatchError(label, f"matches {some}, with no parameters", "Name what has parameters")
    raise _no_match(inventory, label, pattern, dict.fromkeys([*names, *inventory.modules]))


def _no_match(
    inventory: Inventory, asked: str, pattern: str, *pools: Collection[str]
) -> MatchError:
    """Return the error for a pattern that matches nothing.

    Suggestions come from the first pool of names that has one; the last pool holds all.
    """
    if buffers := Names(inventory.buffers).matching(pattern, asked):
        problem = f"matches only buffers: {quoted(buffers[:3])}"
        return MatchError(asked, problem, "Name a module or a parameter; buffers do not train")
    problem = f"matched none of {len(pools[-1]):,} names"
    for pool in pools:
        if near := nearest(pattern, pool):
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


def _trained(
    config: Config, inventory: Inventory, sites: Sequence[SiteSpec], candidates: Sequence[Candidate]
) -> tuple[Trained, ...]:
    """Return the parameters that `train`, `bias` and `tokens` name, in model order."""
    shapes = inventory.parameters
    entries = dict[str, Trained]()
    for i, pattern in enumerate(config.train):
        label = f"train {i + 1} ('{pattern}')"
        for name in _listed(pattern, label, inventory):
            entries.setdefault(name, Trained(name, shapes[name], label))
    if config.bias != "none":
        label = f"bias: {config.bias}"
        for name in _biases(config.bias, inventory, candidates):
            entries.setdefault(name, Trained(name, shapes[name], label))
    for pattern, ids in dict(config.tokens).items():
        label = f"tokens '{pattern}'"
        for name in _tables(pattern, ids, label, inventory):
            if name in entries:
                both = f"'{name}' is also named by {entries[name].why}"
                raise MatchError(label, both, "Narrow one of the two patterns")
            entries[name] = Trained(name, (len(ids), *shapes[name][1:]), label, ids)
    if entries:
        _check_not_both(entries, inventory, sites)
    return tuple(entries[name] for name in shapes if name in entries)


def _check_not_both(
    entries: Mapping[str, Trained], inventory: Inventory, sites: Iterable[SiteSpec]
) -> None:
    """Raise for a tensor that is adapted and trained, under whichever of its names it is tied."""
    for site in sites:
        name = canonical(site.weight)
        entry = entries.get(inventory.listed.get(name, name))
        if entry is not None:
            problem = f"'{entry.name}' is the weight of the site '{site.name}'"
            remedy = f"Exclude '{site.name}', or narrow the pattern"
            raise MatchError(entry.why, f"{problem}: adapted and trained both", remedy)


def _tables(pattern: str, ids: tuple[int, ...], label: str, inventory: Inventory) -> list[str]:
    """Return the embeddings and heads that a tokens entry means, which must have these rows."""
    shapes = inventory.parameters
    tables = [name for name in _listed(pattern, label, inventory) if name in inventory.tables]
    remedy = "Name an embedding; train: takes other parameters, in full"
    for name in inventory.pool.matching(pattern, label):
        number = inventory.sites.get(name, inventory.weights.get(name))
        if number is None:
            continue
        found = inventory.candidates[number]
        if inventory.listed.get(found.weight, found.weight) not in inventory.tables:
            raise MatchError(label, f"'{name}' is no embedding, but of kind {found.kind}", remedy)
    if not tables:
        raise MatchError(label, "it names no embedding", remedy)
    for name in tables:
        if max(ids) >= shapes[name][0]:
            less = f"'{name}' has no row {max(ids)}: it has {shapes[name][0]:,} rows"
            remedy = "Resize the vocabulary first: model.resize_token_embeddings(n)"
            raise MatchError(label, less, remedy)
    return tables


def _listed(pattern: str, label: str, inventory: Inventory) -> dict[str, None]:
    """Return the parameters that an entry means, each under its first name."""
    names = _named(pattern, label, inventory.listed, inventory)
    return dict.fromkeys(inventory.listed[name] for name in names)


def _biases(which: str, inventory: Inventory, candidates: Sequence[Candidate]) -> list[str]:
    """Return all biases, or those of adapted modules."""
    names = [name for name in inventory.parameters if is_bias(name)]
    where = f"none of {len(inventory.parameters):,} parameters"
    if which == "adapted":
        modules = {candidate.module for candidate in candidates}
        names = [name for name in names if parent(name) in modules]
        where = f"none of {len(modules):,} adapted modules"
    if not names:
        remedy = "Set bias: none" if which == "all" else "Set bias: none, or all"
        raise MatchError(f"bias: {which}", f"{where} is or has a bias", remedy)
    return names
