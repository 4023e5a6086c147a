"""What trains besides the adapters: the parameters that `train`, `bias` and `tokens` name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lora_inject.core.spec.below import Below, modules_of
from lora_inject.core.spec.config import Config
from lora_inject.core.spec.inventory import Candidate, Inventory
from lora_inject.core.spec.names import canonical, is_bias, parent, quoted
from lora_inject.core.spec.patterns import matching
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.unmatched import no_match
from lora_inject.errors import MatchError


class Trained(NamedTuple):
    """A parameter of the base that trains with the adapter, as its own copy; `why` names it.

    With `rows` only these rows train, and `shape` is theirs.
    """

    name: str
    shape: tuple[int, ...]
    why: str
    rows: tuple[int, ...] | None = None


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
    all_modules = modules_of(inventory)
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
