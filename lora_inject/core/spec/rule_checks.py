"""What a rule's slices and experts must be together; loaded for rules that have them.

Checks raise ValueError(found, remedy), as validators of a config do.
"""

from __future__ import annotations

from typing import Any

from lora_inject.core.spec.words import show


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
