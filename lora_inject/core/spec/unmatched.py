"""Rules that take nothing: why, and what is spelled like them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from lora_inject.core.spec.below import Below
from lora_inject.core.spec.experts import why_no_stack
from lora_inject.core.spec.inventory import Inventory
from lora_inject.core.spec.names import quoted
from lora_inject.core.spec.patterns import matching
from lora_inject.core.spec.spellings import nearest, nearest_names, templates
from lora_inject.errors import MatchError


def no_match(inventory: Inventory, asked: str, pattern: str, *pools: Collection[str]) -> MatchError:
    """Return the error for a pattern that matches nothing.

    Suggestions come from the first pool of names that has one; the last pool holds all.
    """
    if buffers := matching(pattern, inventory.buffers, asked=asked):
        problem = f"matches only buffers: {quoted(buffers[:3])}"
        return MatchError(asked, problem, "Name a module or a parameter; buffers do not train")
    problem = f"matched none of {len(pools[-1]):,} names"
    if "experts" in pattern and (hint := why_no_stack(pattern, pools[0])):
        return MatchError(asked, f"{problem}; {hint[0]}", hint[1])
    for pool in pools:
        if near := nearest_names(pattern, pool):
            return MatchError(asked, problem, f"Nearest: {quoted(near)}")
    if some := quoted(list(templates(next(filter(None, pools), ())))[:4]):
        return MatchError(asked, problem, f"Nothing is spelled like it; there is {some}")
    return MatchError(asked, problem, "There is nothing to adapt")


def no_kind(label: str, kind: str, kinds: Counter[str]) -> MatchError:
    """Return the error of a rule that matches other kinds only."""
    near = nearest(kind, kinds, n=1)
    there = ", ".join(f"{kind} ({n:,})" for kind, n in kinds.items()) or "no kind of layer"
    problem = f"nothing that it matches is of kind '{kind}', but of {there}"
    return MatchError(label, problem, f"Did you mean '{near[0]}'?" if near else "Correct kind")


def all_gone(label: str, left: Counter[str]) -> MatchError:
    """Return the error of a rule of which others have taken all."""
    who = ", ".join(f"{taker} ({n:,})" for taker, n in left.items())
    remedy = "Put the narrower rule first, or remove this one"
    return MatchError(label, f"all that it matches is taken by {who}", remedy)


def all_skipped(label: str, others: Sequence[str], inventory: Inventory) -> MatchError:
    """Return the error of a rule that matches only what cannot be a site."""
    some = ", ".join(f"'{name}' ({inventory.reason(name)})" for name in others[:3])
    more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
    below = Below(others[:1])
    inside = quoted([c.name for c in inventory.candidates if c.name in below][:4])
    in_it = f"Name what is in it: {inside}"
    remedy = in_it if inside else "Name modules or parameters that hold a matrix"
    return MatchError(label, f"matches only what cannot take an adapter: {some}{more}", remedy)
