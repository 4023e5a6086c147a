"""Tensors with several names that a plan touches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lora_inject.core.spec.inventory import Candidate, Inventory
from lora_inject.core.spec.names import canonical
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.trained import Trained


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
