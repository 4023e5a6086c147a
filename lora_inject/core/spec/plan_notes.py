"""What a plan tells whoever looks at it: ties, and notes. An injection needs neither."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lora_inject.core.spec.config import ALL_LINEAR, Config
from lora_inject.core.spec.experts import notes_on_experts
from lora_inject.core.spec.inventory import Candidate, Inventory
from lora_inject.core.spec.layouts import narrow_side
from lora_inject.core.spec.names import counted, quoted
from lora_inject.core.spec.plan import Plan, tied_by
from lora_inject.core.spec.sites import SiteSpec


def with_notes(plan: Plan, inventory: Inventory, candidates: Sequence[Candidate]) -> Plan:
    """Return a plan with its ties and notes; `candidates` are those of its sites."""
    if any(candidate.tied for candidate in inventory.candidates):
        tied = tied_by(inventory, plan.sites, candidates, plan.trained)
        plan = replace(plan, tied=tied)
    on_words = _on_words(plan.config, inventory, plan.sites)
    return replace(plan, notes=(*on_words, *_on_numbers(candidates, plan.sites)))


def _on_words(config: Config, inventory: Inventory, sites: Sequence[SiteSpec]) -> Iterator[str]:
    """Yield what rules that are a word leave out: the output head, and of experts."""
    if any(rule.match == ALL_LINEAR for rule in config.targets):
        if inventory.heads:
            yield f"all-linear leaves out the output head {quoted(inventory.heads)}"
        else:
            yield "all-linear takes every linear layer: the model states no output head"
    if inventory.mixtures:
        yield from notes_on_experts(config, inventory.mixtures, sites)


def _on_numbers(candidates: Sequence[Candidate], sites: Sequence[SiteSpec]) -> Iterator[str]:
    """Yield notes about the sites for the user, in sentences."""
    wide = [site for site in sites if site.rank > narrow_side(site)]
    if wide:
        yield (
            f"the rank is above the smaller side of {_several(wide)}; a rank of that side can "
            "express every update"
        )
    above = [site for site in sites if site.n_parameters > math.prod(site.weight_shape)]
    if full := [site for site in above if site.rank <= narrow_side(site)]:
        yield f"A and B have more elements than W at {_several(full)}"
    pairs = zip(candidates, sites, strict=True)
    read = (c for c, site in pairs if site.update == "weight" and site.compute == "base")
    if rounded := [c.dtype for c in read if c.dtype in ("bfloat16", "float16")]:
        yield (
            f"{counted(len(rounded), 'weight update')} over {rounded[0]}: W + delta is rounded on "
            "every read; compute: float32 keeps small deltas"
        )


def _several(sites: Sequence[SiteSpec]) -> str:
    first = f"'{sites[0].name}' ({sites[0].in_features:,} -> {sites[0].out_features:,})"
    return first if len(sites) == 1 else f"{len(sites):,} sites, first {first}"
