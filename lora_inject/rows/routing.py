"""A routed batch as one layer sees it: which of its adapters each row has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_inject.core.functional.factors import Update
from lora_inject.core.layers.attached import Entry, Recipe, factors_of
from lora_inject.core.layers.sending import sent


class Places(NamedTuple):
    """Which of some adapters each row of a batch has, on a device.

    Attributes:
        rows: `(batch,)`, int64: 0 for the base, else 1 + the adapter's place.
        blocks: The same with one for each run of rows of one adapter where all runs are equally
            long.
        in_order: Whether `blocks` has each adapter once, in their order.
    """

    rows: Tensor
    blocks: Tensor
    in_order: bool = False


class Routing(NamedTuple):
    """The adapters of a batch that are on a layer, and which each row has."""

    entries: Sequence[Entry]
    places: Places
    recipes: Sequence[Sequence[Recipe]] = ()

    def factors(self, held: Mapping[str, Any], *, training: bool) -> list[list[Update]]:
        """Return the updates of each adapter."""
        return [factors_of(recipes, held, training=training) for recipes in self.recipes]


def routing(entries: Sequence[Entry], places: Places) -> Routing:
    """Return the routing of a layer's entries."""
    recipes = [tuple(entry.recipes(1.0)) if entry.spec else () for entry in entries]
    return Routing(entries, places, recipes)


NOTHING = Routing((), Places(torch.empty(0), torch.empty(0)))
"""The routing of a layer that has none of the adapters."""


def places_of(
    rows: Sequence[str | None], adapters: Sequence[str], repeat: int, device: torch.device
) -> Places:
    """Return which adapter each row has, each row `repeat` times.

    Examples:
        >>> places = places_of(["b", None, "a"], ["a", "b"], 1, torch.device("cpu"))
        >>> places.rows.tolist()
        [2, 0, 1]
    """
    place = {name: i for i, name in enumerate(adapters, 1)}
    each = [place.get(name or "", 0) for name in rows for _ in range(repeat)]
    run = math.gcd(*(len(list(same)) for _, same in groupby(each)))
    blocks = each[::run]
    in_order = blocks == list(place.values())
    return Places(sent(each, device), sent(blocks, device), in_order)
