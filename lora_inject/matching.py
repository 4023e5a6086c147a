r"""Which names a config means: from patterns and an inventory of names to a plan of sites.

One idea: matching works on names and shapes alone. A live model, a model on the meta device and a
checkpoint's key list all become one `Inventory`, and `resolve` is a pure function of a config and
an inventory, so whatever can be planned can be checked, counted and refused before anything exists
that could be changed.

The rules: patterns are tried in order against the *end* of canonical names, the first rule wins,
excludes go first. Every pattern must hit something. A module counts before its own weight, and no
tensor gets two sites.

What is not here: which modules can carry an adapter (`layers` fills the inventory of a model) and
any tensor. No pattern is run that the user did not write.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

from lora_inject.config import Config, Hyper, Rule
from lora_inject.errors import LayerError, MatchError, nearest
from lora_inject.sites import SiteSpec, Slices

__all__ = ["Candidate", "Inventory", "Plan", "Skipped", "Tied", "Trained"]
__all__ += ["canonical", "match_end", "resolve"]

# Segments that wrappers put into names: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


# Names


def canonical(name: str, *, ddp: bool = False) -> str:
    """Return a dotted name without the segments that wrappers put into it.

    Args:
        name: Name of a module, a parameter or a checkpoint's key.
        ddp: Also drop a leading `module`, as DistributedDataParallel adds one. Only the caller
            knows whether there is such a wrapper: a model may have a child called `module`.

    Returns:
        The name by which patterns, adapters and files know it; `parametrizations.X.original` stays.

    Example:
        >>> canonical("_orig_mod.layers.0._checkpoint_wrapped_module.q_proj")
        'layers.0.q_proj'
        >>> canonical("module.head"), canonical("module.head", ddp=True)
        ('module.head', 'head')
    """
    if ddp or "_orig_mod" in name or "_wrapped_module" in name:
        segments = [segment for segment in name.split(".") if segment not in _WRAPPERS]
        if ddp and segments[:1] == ["module"]:
            del segments[0]
        return ".".join(segments)
    return name


@lru_cache(maxsize=1024)
def match_end(pattern: str) -> re.Pattern[str]:
    r"""Compile a pattern so that it must match the end of a dotted name.

    It must begin at the name's start or just after a dot, and end where the name ends. Everything
    inside the pattern keeps its meaning: alternations, a leading `^` (the name's start), inline
    flags, verbose mode, group numbers and names.

    Args:
        pattern: A Python regex that compiles by itself.

    Returns:
        A compiled pattern; use `.match(name)`.

    Example:
        >>> names = ("a.q_proj", "a.my_q_proj", "a.q_proj_norm")
        >>> [name for name in names if match_end("q_proj").match(name)]
        ['a.q_proj']
    """
    flags = re.compile(pattern).flags
    # Global inline flags may only stand first, so they are passed to `compile` instead.
    space = r"\s*" if flags & re.VERBOSE else ""
    body = re.sub(rf"\A(?:\(\?[aiLmsux]+\){space})+", "", pattern)
    # In verbose mode the line break ends a comment that would swallow the bracket.
    close = "\n)" if flags & re.VERBOSE else ")"
    return re.compile(rf"(?s:.*\.)?(?:{body}{close}\Z", flags)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


class _Below:
    """Whether a name, or a module that it lies in, is in a set; each module is asked once."""

    def __init__(self, hits: Iterable[str]) -> None:
        self._known = dict.fromkeys(hits, True)
        self._known.setdefault("", False)

    def __contains__(self, name: str) -> bool:
        asked = []
        while (known := self._known.get(name)) is None:  # "" is always known
            asked.append(name)
            name = _parent(name)
        self._known.update(dict.fromkeys(asked, known))
        return known


def _is_bias(name: str) -> bool:
    leaf = _leaf(name)
    return leaf == "bias" or leaf.endswith("_bias")


# What there is


@dataclass(frozen=True, slots=True)
class Candidate:
    """A module or a parameter that may become a site.

    Attributes:
        name: Canonical dotted name.
        kind: Row of the table of layer kinds: `linear`, `conv1d`, `embedding`, `conv`, ...; or
            `parameter`.
        in_features: Width of the input of A.
        out_features: Width of the output of B.
        weight_shape: Shape of the weight tensor.
        weight: Name of the weight tensor in the state dict.
        transposed: True where the weight matrix is `(in, out)`.
        experts: Number of stacked matrices, or None.
        owner: For a parameter, the name of the module that owns it.
        aliases: Other names of the same module or parameter.
        tied: Names of the same tensor in other modules.
        refusal: None, or what was found and what to do, where it may not be adapted.
        needs_layout: True for a stacked parameter, whose rule must say which dimension is which.
        mount: `forward`, or `weight` where the weight is read rather than the module called.
        dtype: The weight's dtype, such as `bfloat16`, or empty where it is not known.
        members: Names of the candidates for which this one stands: whoever names an attention
            module means its projections. Such a name is no site itself.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    weight_shape: tuple[int, ...]
    weight: str
    transposed: bool = False
    experts: int | None = None
    owner: str = ""
    aliases: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    refusal: tuple[str, str] | None = None
    needs_layout: bool = False
    mount: Literal["forward", "weight"] = "forward"
    dtype: str = ""
    members: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Name of the module whose biases belong to this candidate."""
        return self.owner if self.kind == "parameter" else self.name

    def as_parameter(self, name: str) -> Candidate:
        """The same weight as a parameter, for a pattern that hits the weight alone."""
        return replace(
            self, name=name, kind="parameter", owner=self.name, mount="weight", aliases=()
        )


@dataclass(frozen=True)
class Inventory:
    """All names of a model or a checkpoint, with what matching needs to know of each.

    Attributes:
        candidates: What may become a site, in model order.
        others: Every other name of a module or a parameter, with the short reason why it may not:
            `container`, `LayerNorm`, `Dropout`, ...
        parameters: Shape of every parameter, by canonical name, a tied one under its first name.
        assumed: True where kinds were guessed from names and shapes.
        aliases: Further names of parameters, with the one under which `parameters` has them.
    """

    candidates: tuple[Candidate, ...]
    others: Mapping[str, str]
    parameters: Mapping[str, tuple[int, ...]]
    assumed: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_keys(cls, shapes: Mapping[str, tuple[int, ...]]) -> Inventory:
        """Guess an inventory from a checkpoint's keys and shapes.

        A two-dimensional `X.weight` is taken for a linear layer, for an embedding where X is
        called like one, and for a Conv1D `(in, out)` where the length of `X.bias` says so (for a
        square weight, where all other biases of the checkpoint do); one of three to five
        dimensions for a convolution. Other tensors of two or more dimensions are parameters.

        Args:
            shapes: Shape of each tensor by its key, in the checkpoint's order.

        Returns:
            The inventory, marked as assumed.

        Example:
            >>> inventory = Inventory.from_keys({"h.0.q.weight": (4, 8), "h.0.ln.weight": (8,)})
            >>> [(c.name, c.kind, c.in_features) for c in inventory.candidates]
            [('h.0.q', 'linear', 8)]
            >>> inventory.others["h.0.ln"]
            'no matrix'
        """
        parameters = {canonical(key): tuple(shape) for key, shape in shapes.items()}
        square_conv1d = _all_conv1d(parameters)
        candidates, others = [], dict[str, str]()
        for key in shapes:
            name = canonical(key)
            candidate = _assume(name, key, parameters, square_conv1d)
            if candidate is not None:
                candidates.append(candidate)
            else:
                others[name] = "bias" if _is_bias(name) else f"{len(parameters[name])}-d tensor"
        known = {candidate.name for candidate in candidates}
        others.update(_modules_around(parameters, known))
        return cls(tuple(candidates), others, parameters, assumed=True)


def _modules_around(parameters: Iterable[str], known: set[str]) -> dict[str, str]:
    """Modules that the names of parameters imply and that are no candidates, with the reason."""
    owners = dict.fromkeys(_parent(name) for name in parameters)
    containers: dict[str, None] = {}
    for owner in owners:
        module = _parent(owner)
        while module and module not in containers:
            containers[module] = None
            module = _parent(module)
    reasons = {**dict.fromkeys(owners, "no matrix"), **dict.fromkeys(containers, "container")}
    return {name: why for name, why in reasons.items() if name and name not in known}


def _all_conv1d(parameters: Mapping[str, tuple[int, ...]]) -> bool:
    """True if every bias that tells `(in, out)` from `(out, in)` speaks for `(in, out)`."""
    votes = set()
    for name, shape in parameters.items():
        bias = parameters.get(f"{_parent(name)}.bias", ())
        if name.endswith(".weight") and len(shape) == 2 and shape[0] != shape[1] and bias:
            votes.add(bias == shape[1:])
    return votes == {True}


def _assume(
    name: str, key: str, parameters: Mapping[str, tuple[int, ...]], square_conv1d: bool
) -> Candidate | None:
    """The candidate that a tensor most likely is, or None."""
    shape = parameters[name]
    if len(shape) < 2 or _is_bias(name) or 0 in shape:
        return None
    module = _parent(name)
    if not module or _leaf(name) != "weight" or len(shape) > 5:
        rows, cols = shape[-2:]
        lead = math.prod(shape[:-2]) if len(shape) > 2 else None
        return Candidate(
            name, "parameter", cols, rows, shape, key, False, lead, module,
            needs_layout=len(shape) > 2, mount="weight",
        )  # fmt: skip
    if len(shape) > 2:
        return Candidate(module, "conv", math.prod(shape[1:]), shape[0], shape, key)
    rows, cols = shape
    if _leaf(module) in _EMBEDDINGS or _leaf(module).endswith(("embedding", "embeddings")):
        return Candidate(module, "embedding", rows, cols, shape, key, transposed=True)
    bias = parameters.get(f"{module}.bias", ())
    if bias == (cols,) and (rows != cols or square_conv1d):
        return Candidate(module, "conv1d", rows, cols, shape, key, transposed=True)
    return Candidate(module, "linear", cols, rows, shape, key)


_EMBEDDINGS = frozenset({"wte", "wpe", "embed", "embed_in", "embed_tokens", "embed_positions"})
_EMBEDDINGS |= {"tok_embeddings", "shared", "relative_attention_bias"}


# What will be done


class Trained(NamedTuple):
    """A parameter of the base that trains with the adapter, as the adapter's own copy.

    Attributes:
        name: Canonical name.
        shape: Its shape.
        why: The entry that named it.
    """

    name: str
    shape: tuple[int, ...]
    why: str


class Skipped(NamedTuple):
    """A name that a rule hit but that is no site.

    Attributes:
        name: Canonical name.
        rule: Index of the rule in `config.targets`.
        reason: Why: `container`, `LayerNorm`, `excluded`, ...
    """

    name: str
    rule: int
    reason: str


class Tied(NamedTuple):
    """One tensor under several names, which a site or a `train` entry touches.

    Attributes:
        names: All names of the tensor.
        sites: Sites on it; with two, each adds its own delta where it is used.
        trained: True if a `train` entry names it.
    """

    names: tuple[str, ...]
    sites: tuple[str, ...]
    trained: bool


@dataclass(frozen=True)
class Plan:
    """What a config does to a model, before it is done.

    Attributes:
        config: The config.
        sites: The sites in model order.
        trained: Further parameters that train, in model order.
        skipped: What else the rules hit.
        tied: Tensors with several names that are adapted or trained.
        notes: What the user should know, in sentences.
        n_base: Elements of the base's parameters.
        assumed: True where kinds were guessed from a checkpoint's keys.
    """

    config: Config
    sites: tuple[SiteSpec, ...]
    trained: tuple[Trained, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    tied: tuple[Tied, ...] = ()
    notes: tuple[str, ...] = ()
    n_base: int = 0
    assumed: bool = False

    @property
    def n_sites(self) -> int:
        """Number of sites."""
        return len(self.sites)

    @cached_property
    def n_lora(self) -> int:
        """Elements of A and B of all sites."""
        alike = Counter(_alike(site) for site in self.sites)
        first = {_alike(site): site for site in reversed(self.sites)}
        return sum(first[key].n_parameters * n for key, n in alike.items())

    @cached_property
    def n_trained(self) -> int:
        """Elements of the parameters that `train` and `bias` add."""
        return sum(math.prod(entry.shape) for entry in self.trained)

    @property
    def n_trainable(self) -> int:
        """Elements of A, B and all that `train` and `bias` add."""
        return self.n_lora + self.n_trained

    @cached_property
    def n_sites_by_rule(self) -> tuple[int, ...]:
        """Number of sites of each rule."""
        found = Counter(site.rule for site in self.sites)
        return tuple(found[i] for i in range(len(self.config.targets)))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON.

        Returns:
            Config, totals, sites, trained, skipped, tied, notes.
        """
        return {
            "config": self.config.to_dict(),
            "n_sites": self.n_sites,
            "n_lora": self.n_lora,
            "n_trained": self.n_trained,
            "n_trainable": self.n_trainable,
            "n_base": self.n_base,
            "assumed": self.assumed,
            "sites": [_site_dict(site) for site in self.sites],
            "trained": [{**t._asdict(), "shape": list(t.shape)} for t in self.trained],
            "skipped": [s._asdict() for s in self.skipped],
            "tied": [
                {"names": list(t.names), "sites": list(t.sites), "trained": t.trained}
                for t in self.tied
            ],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _alike(site: SiteSpec) -> tuple[object, ...]:
    """What the number of parameters of a site depends on."""
    return site.rank, site.in_features, site.out_features, site.experts, site.slices


def _site_dict(site: SiteSpec) -> dict[str, Any]:
    slices = site.slices and {"sizes": dict(site.slices.sizes), "adapt": list(site.slices.adapt)}
    return {
        "name": site.name,
        "kind": site.kind,
        "mount": site.mount,
        "weight": site.weight,
        "weight_shape": list(site.weight_shape),
        "in_features": site.in_features,
        "out_features": site.out_features,
        "experts": site.experts,
        "rank": site.rank,
        "alpha": site.alpha,
        "scale": site.scale,
        "dropout": site.dropout,
        "init": list(site.init) if isinstance(site.init, tuple) else site.init,
        "compute": site.compute,
        "slices": slices,
        "rule": site.rule,
        "aliases": list(site.aliases),
        "n_parameters": site.n_parameters,
    }


# From patterns to sites


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
                for name in self.weight_names(candidate):
                    self.weights[name] = i
        self.names = dict.fromkeys(self.sites)
        for names in (self.weights, inventory.others, inventory.parameters, inventory.aliases):
            self.names.update(dict.fromkeys(names))

    @staticmethod
    def weight_names(candidate: Candidate) -> list[str]:
        """Names of the weight of a module, the canonical one first."""
        weight = canonical(candidate.weight)
        tail = weight.removeprefix(candidate.name)
        return [weight, *(alias + tail for alias in candidate.aliases)]

    def reason(self, name: str) -> str:
        """Why a name is no candidate."""
        inventory = self.inventory
        if name in inventory.others:
            return inventory.others[name]
        name = inventory.aliases.get(name, name)
        return "bias" if _is_bias(name) else f"{len(inventory.parameters[name])}-d parameter"

    @cached_property
    def modules(self) -> list[str]:
        """Names of all modules, containers included."""
        tensors = (self.parameters, self.weights)
        names = dict.fromkeys(n for n in self.names if not any(n in t for t in tensors))
        for name in (*self.names, *self.parameters):
            module = _parent(name)
            while module and module not in names:
                names[module] = None
                module = _parent(module)
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
            children.setdefault(_parent(name), []).append(name)
        return children


def _rule_label(config: Config, i: int) -> str:
    return f"rule {i + 1} ('{config.targets[i].match}')"


def _hits(pattern: str, names: Iterable[str]) -> list[str]:
    match = match_end(pattern).match
    return [name for name in names if match(name)]


def _excluded(config: Config, index: _Index) -> _Below:
    """The names that no rule may take, and all below them."""
    excluded: set[str] = set()
    names = list(dict.fromkeys([*index.names, *index.modules])) if config.exclude else []
    for i, pattern in enumerate(config.exclude):
        hits = _hits(pattern, names)
        if not hits:
            raise _no_match(f"exclude {i + 1} ('{pattern}')", pattern, [names], len(names))
        excluded.update(hits)
    return _Below(excluded)


def _take(
    config: Config,
    i: int,
    index: _Index,
    excluded: _Below,
    taken: dict[str, _Taken],
    skipped: list[Skipped],
) -> None:
    """Let rule `i` take what it hits and nobody has; raise if that is nothing."""
    rule, label = config.targets[i], _rule_label(config, i)
    hits = _hits(rule.match, index.names)
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
    return [name for name in others if not (name in index.parameters and _parent(name) in modules)]


def _is_excluded(candidate: Candidate, index: _Index, excluded: _Below) -> bool:
    names = (candidate.name, *candidate.aliases, *index.weight_names(candidate))
    return any(name in excluded for name in names)


def _no_match(label: str, pattern: str, pools: Sequence[Sequence[str]], n_names: int) -> MatchError:
    for pool in pools:
        if near := _nearest(pattern, pool):
            return MatchError(
                label, f"matched none of {n_names:,} names", f"Nearest: {_quoted(near)}"
            )
    some = next((pool for pool in pools if pool), ())
    remedy = f"Nothing is spelled like it; there is {_quoted(list(_templates(some))[:4])}"
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
    below = _Below(others[:1])
    inside = [c.name for c in index.candidates if c.name in below]
    remedy = "Name modules or parameters that hold a matrix"
    if inside:
        remedy = f"Name what lies in it: {_quoted(inside[:4])}"
    return MatchError(label, f"hits only what cannot carry an adapter: {some}{more}", remedy)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


# What fits a site


class _Fit:
    """Makes the specs of one rule's sites; sites of one shape are checked once."""

    def __init__(self, config: Config, i: int) -> None:
        self.i = i
        self.rule = config.targets[i]
        self.hyper = config.hyper(self.rule)
        self.label = _rule_label(config, i)
        self.shapes: dict[tuple[object, ...], _Shape] = {}

    def spec(self, candidate: Candidate) -> SiteSpec:
        key = (
            candidate.kind,
            candidate.weight_shape,
            candidate.in_features,
            candidate.out_features,
            candidate.transposed,
            candidate.needs_layout,
            candidate.mount,
        )
        shape = self.shapes.get(key)
        if shape is None:
            shape = self.shapes[key] = self._shape(candidate)
        hyper = self.hyper
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
            mount=candidate.mount,
            aliases=candidate.aliases,
        )

    def _shape(self, candidate: Candidate) -> _Shape:
        where = f"'{candidate.name}', hit by {self.label}"
        shape = _orient(candidate, self.rule, where)
        slices = _cut(candidate, shape, self.rule, where)
        _check_rank(candidate, shape, slices, self.hyper, where)
        if candidate.mount == "weight" and self.hyper.dropout:
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
    direct = _hits(pattern, index.parameters)
    modules = _hits(pattern, index.modules)
    if not direct and not modules:
        names = [*index.parameters, *index.modules]
        raise _no_match(label, pattern, [names], len(names))
    below = _Below([*direct, *modules])
    found = dict.fromkeys(first for name, first in index.parameters.items() if name in below)
    if not found:
        some = _quoted(modules[:3])
        raise MatchError(label, f"hits {some}, with no parameters", "Name what has parameters")
    return list(found)


def _biases(config: Config, index: _Index, found: Sequence[Candidate]) -> list[str]:
    if config.bias == "all":
        names = [name for name in index.inventory.parameters if _is_bias(name)]
        where = f"none of {len(index.inventory.parameters):,} parameters"
    else:
        modules = dict.fromkeys(candidate.module for candidate in found)
        names = [n for m in modules for n in index.children.get(m, ()) if _is_bias(n)]
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
        if candidate.mount == "weight"
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


# Nearest names

_MAX_SPELLINGS = 4000
_ALIKE = 0.75  # further names are shown if they are nearly as like as the best


def _plain(pattern: str) -> str:
    r"""A name that the pattern might have meant: `^h\.\d+\.(q|v)_proj$` as `h.0.q_proj`."""
    text = re.sub(r"\A(?:\(\?[aiLmsux]+\))+", "", pattern)
    text = re.sub(r"\(\?(?:[:=!>]|<[=!]|P<\w+>)", "(", text)
    text = re.sub(r"\\d[+*]?|\[0-9\][+*]?", "0", text)
    text = re.sub(r"\[\^?(.)[^]]*\]", r"\1", text)
    text = re.sub(r"\.[+*]\??", "", text)
    text = re.sub(r"\(([^()|]*)(?:\|[^()]*)?\)", r"\1", text)
    return re.sub(r"\\[AbBZ]|[\\^$()+*?]|\{[^}]*\}|\|.*", "", text).strip(".")


def _nearest(pattern: str, names: Iterable[str], n: int = 3) -> list[str]:
    """Names in which some run of segments is spelled most like the pattern, ends first."""
    plain = _plain(pattern)
    width = plain.count(".") + 1
    spellings: dict[str, str] = {}
    inner: dict[str, str] = {}
    for name in _distinct(names):
        segments = name.split(".")
        spellings.setdefault(".".join(segments[-width:]), name)
        for start in range(max(0, len(segments) - width)):
            inner.setdefault(".".join(segments[start : start + width]), name)
        if len(spellings) + len(inner) > _MAX_SPELLINGS:
            break
    for spelling, name in inner.items():
        spellings.setdefault(spelling, name)
    near = nearest(plain, spellings, n=n) if plain else []
    likeness = [SequenceMatcher(None, plain, spelling).ratio() for spelling in near]
    near = [x for x, like in zip(near, likeness, strict=True) if like > _ALIKE * max(likeness)]
    return list(dict.fromkeys(spellings[spelling] for spelling in near))


def _distinct(names: Iterable[str]) -> list[str]:
    """The first of all names that differ in numbers only."""
    return list({re.sub(r"\d+", "0", name): name for name in reversed(list(names))}.values())[::-1]


# The table


def _runs(numbers: Iterable[int]) -> str:
    """`0, 1, 2, 5` as `{0..2,5}`, a single number as itself."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    texts = [str(p[0]) if len(p) == 1 else f"{p[0]}..{p[-1]}" for p in parts]
    return texts[0] if texts == [texts[0]] and ".." not in texts[0] else f"{{{','.join(texts)}}}"


def _templates(names: Iterable[str]) -> dict[str, int]:
    """Names with their numbers collapsed, and how many each stands for.

    Exact: a template is written only for names that all exist, so its count is the size of its
    runs' product.

    Example:
        >>> _templates(["h.0.q", "h.1.q", "h.0.v"])
        {'h.{0..1}.q': 2, 'h.0.v': 1}
    """
    groups = {tuple(name.split(".")): 1 for name in names}
    depth = max(map(len, groups), default=0)
    for at in reversed(range(depth)):
        groups = _collapse(groups, at)
    return {".".join(key): n for key, n in groups.items()}


def _collapse(groups: dict[tuple[str, ...], int], at: int) -> dict[tuple[str, ...], int]:
    """Join names that differ in the number at one position only."""
    joined: dict[tuple[object, ...], tuple[tuple[str, ...], list[int], int]] = {}
    for key, n in groups.items():
        if at < len(key) and key[at].isdecimal() and key[at] == str(int(key[at])):
            bucket: tuple[object, ...] = (key[:at], key[at + 1 :], n)
            numbers = joined.setdefault(bucket, (key, [], n))[1]
            numbers.append(int(key[at]))
        else:
            joined[(key, None)] = (key, [], n)
    result = {}
    for key, numbers, n in joined.values():
        run = (_runs(numbers),) if numbers else key[at : at + 1]
        result[(*key[:at], *run, *key[at + 1 :])] = n * max(1, len(numbers))
    return result


def _lines(plan: Plan) -> Iterator[str]:
    """The plan as text: sites by rule, what else trains, what was skipped, totals."""
    if plan.assumed:
        yield "kinds are assumed from names and shapes"
    for i, rule in enumerate(plan.config.targets):
        sites = [site for site in plan.sites if site.rule == i]
        yield f"rule {i + 1} '{rule.match}': {_hyper_text(plan.config.hyper(rule))}"
        yield from _columns([_row(name, n, site) for name, n, site in _by_shape(sites)])
    for why in dict.fromkeys(entry.why for entry in plan.trained):
        yield f"{why}: trained in full"
        entries = [entry for entry in plan.trained if entry.why == why]
        yield from _columns([_trained_row(*row) for row in _by_size(entries)])
    for reason in dict.fromkeys(entry.reason for entry in plan.skipped):
        names = _templates(dict.fromkeys(e.name for e in plan.skipped if e.reason == reason))
        some = ", ".join(list(names)[:4]) + (", ..." if len(names) > 4 else "")
        yield f"skipped, {reason}: {some}"
    for tied in plan.tied:
        yield f"tied: {' = '.join(tied.names)}; {_tied_text(tied)}"
    for note in plan.notes:
        yield f"note: {note}"
    yield _totals(plan)


def _hyper_text(hyper: Hyper) -> str:
    root = f"sqrt({hyper.rank})" if hyper.scaling == "rslora" else str(hyper.rank)
    init = hyper.init if isinstance(hyper.init, str) else f"normal({hyper.init[1]:g})"
    parts = [f"rank {hyper.rank}", f"scale {hyper.alpha:g}/{root}", init]
    parts += [f"dropout {hyper.dropout:g}"] if hyper.dropout else []
    parts += ["compute float32"] if hyper.compute == "float32" else []
    return ", ".join(parts)


def _by_shape(sites: Sequence[SiteSpec]) -> Iterator[tuple[str, int, SiteSpec]]:
    groups: dict[tuple[object, ...], list[SiteSpec]] = {}
    for site in sites:
        groups.setdefault((site.kind, site.mount, *_alike(site)), []).append(site)
    for alike in groups.values():
        for name, n in _templates(site.name for site in alike).items():
            yield name, n, alike[0]


def _row(name: str, n: int, site: SiteSpec) -> tuple[str, ...]:
    experts = "" if site.experts is None else f"{site.experts} x "
    shape = f"{experts}{site.in_features:,} -> {site.out_features:,}"
    if site.slices:
        shape += f" [{', '.join(site.slices.adapt)}]"
    by_weight = site.mount == "weight" and site.kind != "parameter"
    kind = f"{site.kind} (weight)" if by_weight else site.kind
    each = site.n_parameters
    return name, f"x{n:,}", kind, shape, f"{each:,} each", f"{each * n:,}"


def _by_size(entries: Sequence[Trained]) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    groups: dict[tuple[int, ...], list[str]] = {}
    for entry in entries:
        groups.setdefault(entry.shape, []).append(entry.name)
    for shape, names in groups.items():
        for name, n in _templates(names).items():
            yield name, n, shape


def _trained_row(name: str, n: int, shape: tuple[int, ...]) -> tuple[str, ...]:
    size = math.prod(shape)
    text = " x ".join(f"{side:,}" for side in shape) or "scalar"
    return name, f"x{n:,}", "trained", text, f"{size:,} each", f"{size * n:,}"


def _columns(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Rows with aligned columns, the last two to the right."""
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if k >= len(row) - 2 else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(cells)


def _tied_text(tied: Tied) -> str:
    text = f"adapted at {', '.join(tied.sites)} only" if tied.sites else ""
    if len(tied.sites) > 1:
        text = f"adapted at {' and '.join(tied.sites)}, each with its own delta"
    if tied.trained:
        text += ("; " if text else "") + "trained under all its names"
    return text


def _totals(plan: Plan) -> str:
    share = (
        f", {100 * plan.n_trainable / plan.n_base:.3g} % of {plan.n_base:,}" if plan.n_base else ""
    )
    extra = f" + {plan.n_trained:,} trained in full" if plan.trained else ""
    return (
        f"{plan.n_sites:,} sites: {plan.n_lora:,} in A and B{extra} = "
        f"{plan.n_trainable:,} trainable{share}; {4 * plan.n_trainable / 1e6:,.1f} MB in float32"
    )
