r"""Which names a config means: from patterns and an inventory of names to a plan of sites.

Matching works on names and shapes alone. `resolve` is a pure function of a config and an
inventory, so whatever can be planned can be checked, counted and refused before anything exists
that could be changed.

The rules: patterns are tried in order against the *end* of canonical names, the first rule wins,
excludes go first. Every pattern must hit something. A module counts before its own weight, and no
tensor gets two sites.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from lora_inject.errors import LayerError, MatchError
from lora_inject.spec.config import Config, Hyper, Rule
from lora_inject.spec.inventory import Candidate, Inventory
from lora_inject.spec.names import (
    Below,
    canonical,
    is_bias,
    matching,
    nearest_names,
    parent,
    quoted,
    templates,
)
from lora_inject.spec.plan import Plan, Skipped, Tied, Trained
from lora_inject.spec.sites import SiteSpec, Slices


def resolve(config: Config, inventory: Inventory) -> Plan:
    r"""Find out which sites a config means.

    Rules are tried in order and the first that hits a name takes it. A rule hits a module by its
    name or by any of its aliases. Where it hits a module and the module's own weight, the module is
    the site; a pattern that hits the weight alone (`q_proj\.weight`) mounts the parameter.

    An `exclude` entry takes out what it names *and all that lies below*: `vision_tower` keeps every
    rule off the whole tower, and `lm_head` off `lm_head.weight`, too. It takes out a shared module
    under whichever of its names it hits. It concerns `targets` only, not `train` and `bias`.

    A `train` entry names parameters, or modules, which means all parameters below them. `bias:
    adapted` trains the biases of the modules that have sites; `all` every parameter called `bias`
    or `..._bias`, stacked ones of experts included.

    Args:
        config: The config.
        inventory: The names there are.

    Returns:
        The plan.

    Raises:
        MatchError: A pattern hits nothing, or nothing that it could take; a rank or slices do not
            fit; a weight would be adapted and trained; `expect` is missed.
        LayerError: A rule hits something that cannot carry an adapter.

    Example:
        >>> inventory = Inventory.from_keys({f"h.{i}.q.weight": (8, 8) for i in range(2)})
        >>> plan = resolve(Config(targets=["q"], rank=2), inventory)
        >>> plan.n_sites, plan.n_lora
        (2, 64)
    """
    index = _Index(inventory)
    excluded = _excluded(config, index)
    taken: dict[str, _Taken] = {}  # by the name of the weight, in the order of rules
    skipped: list[Skipped] = []
    for i in range(len(config.targets)):
        _take(config, i, index, excluded, taken, skipped)
    # Rules are tried in turn, but sites are listed as the model has them.
    ordered = sorted(taken.values(), key=lambda entry: entry.order)
    sites = tuple(entry.spec for entry in ordered)
    found = [entry.candidate for entry in ordered]
    trained = _trained(config, index, sites, found)
    plan = Plan(
        config=config,
        sites=sites,
        trained=trained,
        skipped=tuple(skipped),
        tied=_tied(index, sites, found, trained),
        notes=_notes(found, sites),
        n_base=sum(math.prod(shape) for shape in inventory.parameters.values()),
        assumed=inventory.assumed,
    )
    _check_expect(plan)
    return plan


class _Taken(NamedTuple):
    order: int
    candidate: Candidate
    spec: SiteSpec


class _Index:
    """The inventory by name: what a hit on each name means.

    Attributes:
        inventory: The inventory.
        candidates: Its candidates.
        sites: Names and aliases of candidates, with the candidate's number.
        weights: Names of the weights of modules, with the candidate's number.
        names: Every name that a rule can hit.
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


def _rule_label(config: Config, i: int) -> str:
    return f"rule {i + 1} ('{config.targets[i].match}')"


def _excluded(config: Config, index: _Index) -> Below:
    """The names that no rule may take, and all below them."""
    excluded: set[str] = set()
    names = list(dict.fromkeys([*index.names, *index.modules])) if config.exclude else []
    for i, pattern in enumerate(config.exclude):
        label = f"exclude {i + 1} ('{pattern}')"
        hits = matching(pattern, names, asked=label)
        if not hits:
            raise _no_match(label, pattern, [names], len(names))
        excluded.update(hits)
    return Below(excluded)


def _take(
    config: Config,
    i: int,
    index: _Index,
    excluded: Below,
    taken: dict[str, _Taken],
    skipped: list[Skipped],
) -> None:
    """Let rule `i` take what it hits and nobody has; raise if that is nothing."""
    rule, label = config.targets[i], _rule_label(config, i)
    hits = matching(rule.match, index.names, asked=label)
    if not hits:
        pools = [list(index.sites), list(index.names)]
        raise _no_match(label, rule.match, pools, len(index.names))
    fit = _Fit(config, i)
    left: Counter[str] = Counter()
    n_before = len(taken)
    for order, candidate in _candidates_hit(hits, index):
        key = canonical(candidate.weight)
        owner = taken.get(key)
        if config.exclude and _is_excluded(candidate, index, excluded):
            left["exclude"] += 1
            skipped.append(Skipped(candidate.name, i, "excluded"))
        elif owner is not None:
            left[f"rule {(owner.spec.rule or 0) + 1}"] += 1
        elif candidate.refusal is not None:
            raise LayerError(f"'{candidate.name}', hit by {label}", *candidate.refusal)
        else:
            taken[key] = _Taken(order, candidate, fit.spec(candidate))
    others = _others_hit(hits, index)
    skipped.extend(Skipped(name, i, index.reason(name)) for name in others)
    if len(taken) > n_before:
        return
    if left:
        raise _all_gone(label, left)
    raise _all_skipped(label, others, index)


def _candidates_hit(hits: Sequence[str], index: _Index) -> Iterator[tuple[int, Candidate]]:
    """Candidates that were hit, each once: modules first, then weights that were hit alone."""
    numbers: dict[int, None] = {}
    for name in hits:
        if (number := index.sites.get(name)) is not None:
            if members := index.candidates[number].members:
                numbers.update((index.sites[member], None) for member in members)
            else:
                numbers[number] = None
    for number in sorted(numbers, key=lambda n: (index.candidates[n].kind == "parameter", n)):
        yield number, index.candidates[number]
    for name in hits:
        number = None if name in index.sites else index.weights.get(name)
        if number is not None and number not in numbers:
            candidate = index.candidates[number]
            yield number, candidate.as_parameter(canonical(candidate.weight))


def _others_hit(hits: Sequence[str], index: _Index) -> list[str]:
    """Hits that are no candidates, without the parameters of modules that were hit as well."""
    others = [name for name in hits if name not in index.sites and name not in index.weights]
    modules = set(hits) if others else set()
    return [name for name in others if not (name in index.parameters and parent(name) in modules)]


def _is_excluded(candidate: Candidate, index: _Index, excluded: Below) -> bool:
    names = (candidate.name, *candidate.aliases, *index.weight_names(candidate))
    return any(name in excluded for name in names)


def _no_match(label: str, pattern: str, pools: Sequence[Sequence[str]], n_names: int) -> MatchError:
    for pool in pools:
        if near := nearest_names(pattern, pool):
            return MatchError(
                label, f"matched none of {n_names:,} names", f"Nearest: {quoted(near)}"
            )
    some = next((pool for pool in pools if pool), ())
    remedy = f"Nothing is spelled like it; there is {quoted(list(templates(some))[:4])}"
    if not some:
        remedy = "There is nothing that could carry an adapter"
    return MatchError(label, f"matched none of {n_names:,} names", remedy)


def _all_gone(label: str, left: Counter[str]) -> MatchError:
    who = ", ".join(f"{taker} ({n:,})" for taker, n in left.items())
    found = f"all that it hits is taken by {who}"
    return MatchError(label, found, "Put the narrower rule first, or remove this one")


def _all_skipped(label: str, others: Sequence[str], index: _Index) -> MatchError:
    some = ", ".join(f"'{name}' ({index.reason(name)})" for name in others[:3])
    more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
    below = Below(others[:1])
    inside = [c.name for c in index.candidates if c.name in below]
    remedy = "Name modules or parameters that hold a matrix"
    if inside:
        remedy = f"Name what lies in it: {quoted(inside[:4])}"
    return MatchError(label, f"hits only what cannot carry an adapter: {some}{more}", remedy)


# What fits a site


class _Fit:
    """Makes the specs of one rule's sites; sites that differ in their names only are made once."""

    def __init__(self, config: Config, i: int) -> None:
        self.i = i
        self.rule = config.targets[i]
        self.hyper = config.hyper(self.rule)
        self.label = _rule_label(config, i)
        self.made: dict[tuple[object, ...], SiteSpec] = {}

    def spec(self, candidate: Candidate) -> SiteSpec:
        key = (
            candidate.kind,
            candidate.weight_shape,
            candidate.in_features,
            candidate.out_features,
            candidate.transposed,
            candidate.experts,
            candidate.needs_layout,
            candidate.update,
        )
        like = self.made.get(key)
        if like is None:
            like = self.made[key] = self._first(candidate)
        return like.at(candidate.name, candidate.weight, candidate.aliases)

    def _first(self, candidate: Candidate) -> SiteSpec:
        shape, hyper = self._shape(candidate), self.hyper
        return SiteSpec(
            name=candidate.name,
            kind=candidate.kind,
            in_features=shape.in_features,
            out_features=shape.out_features,
            weight_shape=candidate.weight_shape,
            rank=hyper.rank,
            alpha=hyper.alpha,
            transposed=shape.transposed,
            experts=shape.experts,
            scaling=hyper.scaling,
            dropout=hyper.dropout,
            init=hyper.init,
            compute=hyper.compute,
            slices=shape.slices,
            rule=self.i,
            weight=candidate.weight,
            update=candidate.update,
            aliases=candidate.aliases,
        )

    def _shape(self, candidate: Candidate) -> _Shape:
        where = f"'{candidate.name}', hit by {self.label}"
        shape = _orient(candidate, self.rule, where)
        slices = _cut(candidate, shape, self.rule, where)
        _check_rank(candidate, shape, slices, self.hyper, where)
        if candidate.update == "weight" and self.hyper.dropout:
            found = (
                f"dropout {self.hyper.dropout:g} on a weight that is read, not called with inputs"
            )
            raise MatchError(where, found, "Give the rule dropout: 0")
        return shape._replace(slices=slices)


class _Shape(NamedTuple):
    in_features: int
    out_features: int
    transposed: bool
    experts: int | None
    slices: Slices | None = None


def _orient(candidate: Candidate, rule: Rule, where: str) -> _Shape:
    """Which dimension is the input; only a parameter's rule may say it."""
    stated = _Shape(
        candidate.in_features, candidate.out_features, candidate.transposed, candidate.experts
    )
    dims = candidate.weight_shape
    if rule.layout is None:
        if candidate.needs_layout:
            remedy = "Give the rule layout: out_in (Mixtral, Qwen) or in_out (GPT-OSS, Llama 4)"
            raise MatchError(where, f"nothing says which of {dims} is the input", remedy)
        return stated
    if candidate.kind != "parameter" or not (candidate.needs_layout or len(dims) == 2):
        found = f"layout: {rule.layout}, but a {candidate.kind} of shape {dims} has its own"
        raise MatchError(where, found, "Remove layout; it is for stacked parameters")
    transposed = rule.layout == "in_out"
    n_out, n_in = dims[-2:][::-1] if transposed else dims[-2:]
    return _Shape(n_in, n_out, transposed, math.prod(dims[:-2]) if len(dims) > 2 else None)


def _cut(candidate: Candidate, shape: _Shape, rule: Rule, where: str) -> Slices | None:
    """The slices of a site, with their widths."""
    if rule.slices is None or rule.adapt is None:
        return None
    if candidate.kind not in ("linear", "conv1d", "parameter") or shape.experts is not None:
        what = "stacked experts" if shape.experts is not None else f"kind {candidate.kind}"
        found = f"slices, but it is of {what}"
        raise MatchError(where, found, "Slices are for linear layers, Conv1D and 2-d parameters")
    names, width = rule.slice_names, shape.out_features
    sizes = tuple(part for part in rule.slices if isinstance(part, tuple))
    if sizes:
        total = sum(size for _, size in sizes)
        if total != width:
            listed = " + ".join(f"{size:,}" for _, size in sizes)
            found = f"slices of {listed} = {total:,}, but it has {width:,} outputs"
            raise MatchError(where, found, "Give the widths along its output")
    else:
        if width % len(names):
            found = f"{len(names)} equal slices, but {width:,} outputs do not divide"
            raise MatchError(where, found, f"Give the widths: {{{names[0]}: ..., ...}}")
        sizes = tuple((name, width // len(names)) for name in names)
    return Slices(sizes, tuple(name for name in names if name in rule.adapt))


def _check_rank(
    candidate: Candidate, shape: _Shape, slices: Slices | None, hyper: Hyper, where: str
) -> None:
    widths = {"": shape.out_features}
    if slices:
        widths = {f" of slice '{n}'": size for n, size in slices.sizes if n in slices.adapt}
    for what, width in widths.items():
        limit = min(shape.in_features, width)
        if hyper.rank > limit:
            found = (
                f"rank {hyper.rank} is above {limit:,}, the smaller side{what} "
                f"({shape.in_features:,} -> {width:,})"
            )
            remedy = f"Give the rule a rank of at most {limit:,}, or exclude '{candidate.name}'"
            raise MatchError(where, found, remedy)


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
        raise _no_match(label, pattern, [names], len(names))
    below = Below([*direct, *modules])
    found = dict.fromkeys(first for name, first in index.parameters.items() if name in below)
    if not found:
        some = quoted(modules[:3])
        raise MatchError(label, f"hits {some}, with no parameters", "Name what has parameters")
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


def _notes(found: Sequence[Candidate], sites: Sequence[SiteSpec]) -> tuple[str, ...]:
    rounded = [
        candidate.dtype
        for candidate, site in zip(found, sites, strict=True)
        if candidate.update == "weight"
        and candidate.dtype in ("bfloat16", "float16")
        and site.compute == "base"
    ]
    if not rounded:
        return ()
    note = (
        f"{len(rounded):,} weight-mounted sites over {rounded[0]}: W + delta is rounded on every "
        "read; compute: float32 keeps small deltas"
    )
    return (note,)


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
        f"{_rule_label(plan.config, i)} {n:,} sites" for i, n in enumerate(plan.n_sites_by_rule)
    ]
    extra = [f"train and bias {plan.n_trained:,} elements"] if plan.trained else []
    found = f"found {got} ({'; '.join(rules + extra)})"
    raise MatchError(f"expect {{{asked}}}", found, "Correct the rules, or the counts")
