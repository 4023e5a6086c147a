"""What trains besides the adapters: what a config's `train`, `tokens` and `bias` name."""

from __future__ import annotations

from collections.abc import Sequence

from lora_inject.errors import MatchError
from lora_inject.spec.config import Config
from lora_inject.spec.inventory import Candidate, Inventory
from lora_inject.spec.names import Below, canonical, is_bias, matching, quoted
from lora_inject.spec.plan import Tied, Trained
from lora_inject.spec.sites import SiteSpec


def trained_by(
    config: Config, inventory: Inventory, sites: Sequence[SiteSpec], found: Sequence[Candidate]
) -> tuple[Trained, ...]:
    """Return the parameters that `train`, `bias` and `tokens` name, in model order."""
    shapes, entries = inventory.parameters, dict[str, Trained]()
    for i, pattern in enumerate(config.train):
        label = f"train {i + 1} ('{pattern}')"
        for name in _matched(pattern, label, inventory):
            entries.setdefault(name, Trained(name, shapes[name], label))
    if config.bias != "none":
        label = f"bias: {config.bias}"
        for name in _biases(config, inventory, found):
            entries.setdefault(name, Trained(name, shapes[name], label))
    for pattern, ids in dict(config.tokens).items():
        label = f"tokens '{pattern}'"
        for name in _tables(pattern, ids, label, inventory):
            if name in entries:
                both = f"'{name}' is also named by {entries[name].why}"
                raise MatchError(label, both, "Narrow one of the two patterns")
            entries[name] = Trained(name, (len(ids), *shapes[name][1:]), label, ids)
    for site in sites if entries else ():
        weight = canonical(site.weight)
        entry = entries.get(inventory.listed.get(weight, weight))
        if entry is not None:  # under whichever of its names it is tied
            what = f"'{entry.name}' is the weight of the site '{site.name}'"
            remedy = f"Exclude '{site.name}', or narrow the pattern"
            raise MatchError(entry.why, f"{what}: adapted and trained both", remedy)
    return tuple(entries[name] for name in shapes if name in entries) if entries else ()


def _tables(pattern: str, ids: tuple[int, ...], label: str, inventory: Inventory) -> list[str]:
    """Return the matrices that a tokens entry names, which must have these rows."""
    shapes = inventory.parameters
    found = [name for name in _matched(pattern, label, inventory) if len(shapes[name]) == 2]
    if not found:
        raise MatchError(label, "it names nothing that has rows", "Name an embedding")
    for name in found:
        if max(ids) >= shapes[name][0]:
            less = f"'{name}' has no row {max(ids)}: it has {shapes[name][0]:,} rows"
            remedy = "Resize the vocabulary first: model.resize_token_embeddings(n)"
            raise MatchError(label, less, remedy)
    return found


def _matched(pattern: str, label: str, inventory: Inventory) -> list[str]:
    """Return the listed parameters that an entry names, itself or by a module around them."""
    direct = matching(pattern, inventory.listed, asked=label)
    modules = matching(pattern, inventory.modules, asked=label)
    if not direct and not modules:
        raise inventory.no_match(label, pattern, [*inventory.listed, *inventory.modules])
    below = Below([*direct, *modules])
    found = dict.fromkeys(first for name, first in inventory.listed.items() if name in below)
    if not found:
        some = quoted(modules[:3])
        raise MatchError(label, f"matches {some}, with no parameters", "Name what has parameters")
    return list(found)


def _biases(config: Config, inventory: Inventory, found: Sequence[Candidate]) -> list[str]:
    if config.bias == "all":
        names = [name for name in inventory.parameters if is_bias(name)]
        where = f"none of {len(inventory.parameters):,} parameters"
    else:
        modules = dict.fromkeys(candidate.module for candidate in found)
        names = [n for m in modules for n in inventory.children.get(m, ()) if is_bias(n)]
        where = f"none of {len(modules):,} adapted modules"
    if not names:
        remedy = "Set bias: none" if config.bias == "all" else "Set bias: none, or all"
        raise MatchError(f"bias: {config.bias}", f"{where} is or has a bias", remedy)
    return names


def tied_by(
    inventory: Inventory,
    sites: Sequence[SiteSpec],
    found: Sequence[Candidate],
    trained: Sequence[Trained],
) -> tuple[Tied, ...]:
    """Return the tensors with several names that sites or trained entries touch, each once."""
    names = {entry.name for entry in trained}
    on: dict[tuple[str, ...], list[str]] = {}
    for site, candidate in zip(sites, found, strict=True):
        if candidate.tied:
            on.setdefault(_all_names(candidate), []).append(site.name)
    for candidate in inventory.candidates if names else ():
        if candidate.tied and names.intersection(_all_names(candidate)):
            on.setdefault(_all_names(candidate), [])
    return tuple(Tied(same, tuple(at), bool(names.intersection(same))) for same, at in on.items())


def _all_names(candidate: Candidate) -> tuple[str, ...]:
    return tuple(sorted({canonical(candidate.weight), *map(canonical, candidate.tied)}))
