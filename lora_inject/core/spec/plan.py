"""What a config does to a model, as a value before it is done.

A plan is data. It can be counted, compared, printed and written as JSON; it changes
nothing and holds no tensor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from lora_inject.core.spec.config import WORDS, Config
from lora_inject.core.spec.inventory import Candidate, Inventory
from lora_inject.core.spec.limits import notes
from lora_inject.core.spec.names import canonical
from lora_inject.core.spec.plan_table import as_data, table_of
from lora_inject.core.spec.rule_words import notes_on_words
from lora_inject.core.spec.shown import Shown
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.trained import Trained


class Skipped(NamedTuple):
    """A name that a rule matched but that is not a site: `container`, `LayerNorm`, `excluded`."""

    name: str
    rule: int
    reason: str


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What a config does to a model, before it is done.

    Attributes:
        config: The config.
        sites: The sites in model order.
        trained: Further parameters that train, in model order.
        skipped: What else the rules matched.
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
        return sum(site.n_parameters for site in self.sites)

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
        counts = Counter(site.rule for site in self.sites)
        return tuple(counts[i] for i in range(len(self.config.targets)))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON."""
        return as_data(self)

    def text(self, width: int = 80, *, everything: bool = False) -> str:
        """Return the plan as a table that fits into a width; no name is broken.

        Names that differ in numbers share a row, unless `everything`.
        """
        return "\n".join(table_of(self, width, everything=everything))

    def __str__(self) -> str:
        return self.text()


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


class Tied(NamedTuple):
    """One tensor under several names, which sites or a `train` entry touch.

    Of two sites each adds its own delta where it is used.
    """

    names: tuple[str, ...]
    sites: tuple[str, ...]
    trained: bool


def tied_by(
    inventory: Inventory,
    sites: Sequence[SiteSpec],
    candidates: Sequence[Candidate],
    trained: Sequence[Trained],
) -> tuple[Tied, ...]:
    """Return the tensors with several names that sites or trained entries touch, each once."""
    names = {entry.name for entry in trained}
    on: dict[tuple[str, ...], list[str]] = {}
    for site, candidate in zip(sites, candidates, strict=True):
        if candidate.tied:
            on.setdefault(_all_names(candidate), []).append(site.name)
    for candidate in inventory.candidates if names else ():
        if candidate.tied and names.intersection(_all_names(candidate)):
            on.setdefault(_all_names(candidate), [])
    return tuple(Tied(same, tuple(at), bool(names.intersection(same))) for same, at in on.items())


def _all_names(candidate: Candidate) -> tuple[str, ...]:
    return tuple(sorted({canonical(candidate.weight), *map(canonical, candidate.tied)}))
