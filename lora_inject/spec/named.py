"""What each name of a model or a checkpoint means, and what to say when a pattern matches none."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

from lora_inject.errors import MatchError
from lora_inject.spec.inventory import Candidate, Inventory
from lora_inject.spec.names import (
    canonical,
    is_bias,
    matching,
    nearest_names,
    parent,
    quoted,
    templates,
)


class Named:
    """An inventory by name.

    Attributes:
        inventory: The inventory.
        candidates: Its candidates.
        sites: Names and aliases of candidates, with the candidate's number.
        weights: Names of the weights of modules, with the candidate's number.
        names: Every name that a rule can match.
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
        """Return the names of the weight of a module, the canonical one first."""
        weight = canonical(candidate.weight)
        if not candidate.aliases:
            return [weight]
        tail = weight.removeprefix(candidate.name)
        return [weight, *(alias + tail for alias in candidate.aliases)]

    def reason(self, name: str) -> str:
        """Return why a name is not a candidate."""
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
        return {**{name: name for name in self.inventory.parameters}, **self.inventory.aliases}

    @cached_property
    def children(self) -> dict[str, list[str]]:
        """Listed parameters by the module that owns them."""
        children: dict[str, list[str]] = {}
        for name in self.inventory.parameters:
            children.setdefault(parent(name), []).append(name)
        return children

    def no_match(self, asked: str, pattern: str, *pools: Collection[str]) -> MatchError:
        """Return the error for a pattern that matches nothing.

        Suggestions come from the first pool of names that has one; the last pool holds all.
        """
        if buffers := matching(pattern, self.inventory.buffers, asked=asked):
            found = f"matches only buffers: {quoted(buffers[:3])}"
            return MatchError(asked, found, "Name a module or a parameter; buffers do not train")
        found = f"matched none of {len(pools[-1]):,} names"
        for pool in pools:
            if near := nearest_names(pattern, pool):
                return MatchError(asked, found, f"Nearest: {quoted(near)}")
        some = quoted(list(templates(next(filter(None, pools), ())))[:4])
        remedy = (
            f"Nothing is spelled like it; there is {some}" if some else "There is nothing to adapt"
        )
        return MatchError(asked, found, remedy)
