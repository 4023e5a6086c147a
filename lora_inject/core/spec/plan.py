"""What a config does to a model, as a value before it is done.

A plan is data. It can be counted, compared, printed and written as JSON; it changes
nothing and holds no tensor.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from lora_inject.core.spec.config import Config
from lora_inject.core.spec.plan_table import as_data, table_of
from lora_inject.core.spec.shown import Shown
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.tied_names import Tied
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
