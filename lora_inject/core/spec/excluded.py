"""What `exclude` keeps every rule off."""

from __future__ import annotations

from lora_inject.core.spec.below import Below, modules_of
from lora_inject.core.spec.config import Config
from lora_inject.core.spec.inventory import Candidate, Inventory
from lora_inject.core.spec.patterns import matching
from lora_inject.core.spec.unmatched import no_match


class Excluded:
    """The names that no rule may take, and all below them."""

    def __init__(self, config: Config, inventory: Inventory) -> None:
        excluded: set[str] = set()
        names = list(dict.fromkeys([*inventory.names, *modules_of(inventory)]))
        for i, pattern in enumerate(config.exclude):
            label = f"exclude {i + 1} ('{pattern}')"
            hits = matching(pattern, names, asked=label)
            if not hits:
                raise no_match(inventory, label, pattern, names)
            excluded.update(hits)
        self.names = Below(excluded)

    def takes(self, candidate: Candidate) -> bool:
        """Return whether a candidate, under one of its names, is left out."""
        names = (candidate.name, *candidate.aliases, *candidate.weight_names)
        return any(name in self.names for name in names)
