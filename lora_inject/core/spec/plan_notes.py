"""What a plan tells whoever looks at it: ties, and notes. An injection needs neither."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lora_inject.core.spec.config import WORDS
from lora_inject.core.spec.inventory import Candidate, Inventory
from lora_inject.core.spec.limits import notes
from lora_inject.core.spec.plan import Plan
from lora_inject.core.spec.rule_words import notes_on_words
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.tied_names import tied_by


def with_notes(
    plan: Plan, inventory: Inventory, candidates: Sequence[Candidate], forms: Sequence[SiteSpec]
) -> Plan:
    """Return a plan with its ties and notes.

    `candidates` are those of its sites, `forms` one of all sites that differ only in their names.
    """
    if any(candidate.tied for candidate in inventory.candidates):
        tied = tied_by(inventory, plan.sites, candidates, plan.trained)
        plan = replace(plan, tied=tied)
    return replace(plan, notes=tuple(_notes(plan, inventory, candidates, forms)))


def _notes(
    plan: Plan, inventory: Inventory, candidates: Sequence[Candidate], forms: Sequence[SiteSpec]
) -> Iterator[str]:
    if inventory.mixtures or any(rule.match in WORDS for rule in plan.config.targets):
        yield from notes_on_words(plan.config, inventory, plan.sites)
    if any(map(_may_need_a_note, forms)):
        yield from notes(candidates, plan.sites)


def _may_need_a_note(site: SiteSpec) -> bool:
    """Whether users should know something of a site: a wide rank, or a weight that is read."""
    narrow = min(site.in_features, *(stop - start for start, stop in site.spans))
    wide = site.rank > narrow or site.n_parameters > math.prod(site.weight_shape)
    return wide or site.update == "weight"
