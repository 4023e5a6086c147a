"""Rules that are a word instead of a pattern: all-linear and all-experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_inject.core.spec.config import ALL_EXPERTS, ALL_LINEAR, Config
from lora_inject.core.spec.experts import notes_on_experts, why_no_experts
from lora_inject.core.spec.inventory import LINEAR_KINDS, Inventory
from lora_inject.core.spec.names import quoted
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import MatchError


def linear_layers(inventory: Inventory) -> list[str]:
    """Return the names of all linear layers but the output head."""
    linear = (c.name for c in inventory.candidates if c.kind in LINEAR_KINDS)
    return [name for name in linear if name not in inventory.heads]


def names_by_word(word: str, config: Config, inventory: Inventory, label: str) -> list[str]:
    """Return the linear layers, without experts that another rule takes; or the experts."""
    experts = dict.fromkeys(name for mixture in inventory.mixtures for name in mixture.experts)
    if word == ALL_EXPERTS:
        if not experts:
            raise MatchError(label, *why_no_experts(inventory))
        return list(experts)
    words = {rule.match for rule in config.targets}
    left = experts if ALL_EXPERTS in words else ()
    names = [name for name in linear_layers(inventory) if name not in left]
    if not names:
        but = " but its output head" if inventory.heads else ""
        problem = f"the model has no linear layers{but}"
        raise MatchError(label, problem, "Name what to adapt")
    return names


def notes_on_words(
    config: Config, inventory: Inventory, sites: Sequence[SiteSpec]
) -> Iterator[str]:
    """Yield what rules that are a word leave out: the output head, and of experts."""
    if any(rule.match == ALL_LINEAR for rule in config.targets):
        if inventory.heads:
            yield f"all-linear leaves out the output head {quoted(inventory.heads)}"
        else:
            yield "all-linear takes every linear layer: the model states no output head"
    if inventory.mixtures:
        yield from notes_on_experts(config, inventory.mixtures, sites)
