"""What a plan tells whoever looks at it, in sentences. An injection needs none of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from lora_inject.core.spec.config import ALL_EXPERTS, ALL_LINEAR, WORDS, Config
from lora_inject.core.spec.inventory import Candidate, Inventory, Mixture
from lora_inject.core.spec.layouts import narrow_side
from lora_inject.core.spec.names import canonical, counted, quoted, templates
from lora_inject.core.spec.plan import Plan
from lora_inject.core.spec.sites import SiteSpec, forms


def with_notes(plan: Plan, inventory: Inventory, candidates: Sequence[Candidate]) -> Plan:
    """Return a plan with its notes; `candidates` are those of its sites."""
    on_words = _on_words(plan.config, inventory, plan.sites)
    on_ties = _on_ties(inventory, plan)
    return replace(plan, notes=(*on_words, *_on_numbers(candidates, plan.sites), *on_ties))


def _on_words(config: Config, inventory: Inventory, sites: Sequence[SiteSpec]) -> Iterator[str]:
    """Yield what rules that are a word leave out: the output head, and of experts."""
    if any(rule.match == ALL_LINEAR for rule in config.targets):
        if inventory.heads:
            yield f"all-linear leaves out the output head {quoted(inventory.heads)}"
        else:
            yield "all-linear takes every linear layer: the model states no output head"
    if inventory.mixtures:
        words = WORDS.intersection(rule.match for rule in config.targets)
        yield from left_out(words, inventory.mixtures, {site.name for site in sites})


def _on_numbers(candidates: Sequence[Candidate], sites: Sequence[SiteSpec]) -> Iterator[str]:
    """Yield notes about the sites for the user, in sentences."""
    alike = forms(sites)
    if any(map(_is_wide, alike)):
        wide = list(filter(_is_wide, sites))
        yield (
            f"the rank is above the smaller side of {_several(wide)}; a rank of that side can "
            "express every update"
        )
    if any(map(_is_full, alike)):
        full = list(filter(_is_full, sites))
        yield f"A and B have more elements than W at {_several(full)}"
    pairs = zip(candidates, sites, strict=True)
    read = (c for c, site in pairs if site.update == "weight")
    if rounded := [c.dtype for c in read if c.dtype in ("bfloat16", "float16")]:
        yield (
            f"{counted(len(rounded), 'weight update')} over {rounded[0]}: where a read forms "
            "W + delta, it is rounded, and a small delta lost in part; products keep it"
        )


def _is_wide(site: SiteSpec) -> bool:
    return site.rank > narrow_side(site)


def _is_full(site: SiteSpec) -> bool:
    return site.n_parameters > math.prod(site.weight_shape) and not _is_wide(site)


def _on_ties(inventory: Inventory, plan: Plan) -> Iterator[str]:
    """Yield which tensors with several names are adapted or trained, and at which of these."""
    trained = {entry.name for entry in plan.trained}
    ties = (c for c in inventory.candidates if c.tied)
    for names in dict.fromkeys(tuple(sorted({*map(canonical, (c.weight, *c.tied))})) for c in ties):
        tied = f"{' = '.join(names)} is one tensor"
        if at := [site.name for site in plan.sites if canonical(site.weight) in names]:
            each = ", each with its own delta" if len(at) > 1 else " only"
            yield f"{tied}, adapted at {' and '.join(at)}{each}"
        if not trained.isdisjoint(names):
            yield f"{tied}, trained under all its names"


def _several(sites: Sequence[SiteSpec]) -> str:
    first = f"'{sites[0].name}' ({sites[0].in_features:,} -> {sites[0].out_features:,})"
    return first if len(sites) == 1 else f"{len(sites):,} sites, first {first}"


# ----------------------------------------------------------------------------------------- experts


def left_out(words: Collection[str], mixtures: Sequence[Mixture], sites: set[str]) -> Iterator[str]:
    """Yield the experts that rules by a word leave out."""
    left = [name for mixture in mixtures for name in mixture.experts if name not in sites]
    if not left or not words:
        return
    if ALL_EXPERTS in words:
        yield f"not adapted of the experts: {_some(left)}"
    else:
        yield f"all-linear leaves out the experts {_some(left)}; add all-experts to adapt them"


def _some(names: Iterable[str]) -> str:
    """Return names, those that differ in numbers joined, and no more than four."""
    shown = list(templates(names))
    return quoted(shown[:4]) + (", ..." if len(shown) > 4 else "")
