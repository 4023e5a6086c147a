"""What is wrong with the values of a config; and what a rule's slices and experts must be together.

Errors are ValueError(found, remedy), which validators raise.
"""

from __future__ import annotations

from typing import Any

from lora_inject.core.spec.sites import ROLES
from lora_inject.core.spec.spellings import nearest
from lora_inject.core.spec.words import show


def empty_pattern(pattern: str) -> ValueError:
    """Return the error of a pattern that matches a name without characters."""
    remedy = "Write what must be there; '.+' matches every name, '^$' the root"
    return ValueError(f"{show(pattern)} also matches an empty name", remedy)


def repeated(names: tuple[Any, ...]) -> ValueError:
    """Return the error of a list that names something twice."""
    return ValueError(f"{show(list(names))} has a repeated entry", "Write each once")


def unknown_variant(name: str) -> ValueError:
    """Return the error of a variant that is not registered."""
    near = nearest(name, ROLES, n=1)
    remedy = f"Did you mean {show(near[0])}?" if near else f"Known are {', '.join(ROLES)}"
    return ValueError(f"there is no variant {show(name)}", remedy)


def no_rule(data: Any) -> ValueError:
    """Return the error of an entry of `targets` that is no pattern and no mapping."""
    remedy = "Write a pattern in single quotes, or a mapping with 'match'"
    return ValueError(f"{show(data)} is not a rule", remedy)


def slice_names(slices: Any) -> tuple[str, ...]:
    """Return the names of slices in the order of the output; empty without slices.

    Examples:
        >>> slice_names(("q", "k")), slice_names((("q", 8), ("k", 4)))
        (('q', 'k'), ('q', 'k'))
    """
    return tuple(part if isinstance(part, str) else part[0] for part in slices or ())


def check_adapted(adapt: tuple[str, ...], slices: Any) -> None:
    """Raise if a part is to be adapted that is no slice."""
    names = slice_names(slices)
    for name in adapt:
        if name not in names:
            remedy = f"The slices are {', '.join(names)}" if names else "Add slices: [q, k, v]"
            raise ValueError(f"there is no slice {show(name)}", remedy)


def check_slices_and_experts(rule: Any) -> None:
    """Raise if slices come without those to adapt, or the choice of experts is not one."""
    if rule.slices and not rule.adapt:
        remedy = f"Add adapt: with some of {', '.join(slice_names(rule.slices))}"
        raise ValueError("slices are given, but not which of them to adapt", remedy)
    if isinstance(rule.only, str) == (rule.top is None):
        problem = "top needs a profile" if rule.top else f"{show(rule.only)} is a profile"
        raise ValueError(problem, "Give both: only: profile.yaml and top: 0.25")
    if rule.share and rule.only is not None:
        raise ValueError("share is for whole stacks, and only chooses of them", "Give one")
