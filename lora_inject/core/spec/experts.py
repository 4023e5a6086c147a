"""What rules about experts mean, and what a plan says of them.

A rule may divide a rank among the experts that a token goes to, take some experts of a stack, or
let them share a factor.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from lora_inject.core.spec.config import ALL_EXPERTS, WORDS, Config, Rule
from lora_inject.core.spec.expert_profile import ExpertProfile
from lora_inject.core.spec.inventory import Candidate, Inventory, Mixture
from lora_inject.core.spec.names import counted, quoted, templates
from lora_inject.core.spec.sites import FROM_WEIGHT, SiteSpec
from lora_inject.errors import MatchError, article

_STACKED = re.compile(r"experts\\?\.[a-z(]")  # a pattern for a tensor that holds all experts
_IN_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.(\w+)$")


def rank_of_each(candidate: Candidate, together: int, asked: str) -> int:
    """Return the rank of an expert, where those that a token goes to have one together.

    It is the whole part, as Megatron-Bridge and NeMo Automodel divide.

    Raises:
        MatchError: Nobody says to how many a token goes, or the rank is less than that.
    """
    wanted = f"rank: {{active: {together}}}"
    if candidate.active is None:
        problem = f"{wanted}, but the model does not say to how many experts its tokens go"
        remedy = "Give the rule a rank; {active: ...} is for experts beside a router with top_k"
        raise MatchError(asked, problem, remedy)
    if together < candidate.active:
        problem = f"{wanted}, but a token goes to {candidate.active} experts"
        remedy = f"Give active: {candidate.active} or more: it is divided by that"
        raise MatchError(asked, problem, remedy)
    return together // candidate.active


def part_of_stack(candidate: Candidate, rule: Rule, asked: str) -> dict[str, Any]:
    """Return which experts of a stack a rule adapts, and what they share.

    Raises:
        MatchError: It is no stack, has no such expert, or another model was profiled.
    """
    n = candidate.experts
    wanted = "share" if rule.only is None else "only"
    if n is None:
        problem = f"{wanted}, but it is {article(candidate.kind)} of its own"
        remedy = r"It is for stacks; match single experts by name, such as experts\.(0|3)\..*"
        raise MatchError(asked, problem, remedy)
    if rule.share is not None and rule.init in FROM_WEIGHT:
        problem = f"share, and init {rule.init}, which starts each expert from its own weight"
        raise MatchError(asked, problem, "Give the rule another init")
    if isinstance(rule.only, str):
        assert rule.top is not None
        profile = ExpertProfile.from_yaml(rule.only)
        return {"only": profile.most_chosen(candidate.owner, n, rule.top, asked)}
    if rule.only is not None and max(rule.only) >= n:
        problem = f"only: {max(rule.only)}, but it has {n:,} experts, 0 to {n - 1:,}"
        raise MatchError(asked, problem, "Leave that number out")
    return {"only": rule.only and tuple(sorted(rule.only)), "share": rule.share or ""}


def why_no_stack(pattern: str, names: Iterable[str]) -> tuple[str, str] | None:
    """Return why a pattern for stacked experts matches none, and what to do; None if it has none.

    Models of transformers 4 have a module for each expert.
    """
    inside = [match[1] for match in map(_IN_EXPERT.search, names) if match]
    if not inside or not _STACKED.search(pattern):
        return None
    parts = "|".join(dict.fromkeys(inside))
    problem = "experts are modules here, each of its own, as in transformers 4"
    return problem, rf"Match those: experts\.\d+\.({parts})"


def why_no_experts(inventory: Inventory) -> tuple[str, str]:
    """Return what was problem, and what to do, where `all-experts` means nothing."""
    stacks = [c.name for c in inventory.candidates if c.experts is not None]
    there = f"; it has {quoted([*templates(stacks)][:3])}" if stacks else ""
    problem = f"the model has no experts that a router chooses among{there}"
    remedy = (
        "Name the stack by a pattern. Experts are known by transformers' class, or by a router "
        "beside them with an output for each, in a block that states top_k"
    )
    return problem, remedy


def notes_on_experts(
    config: Config, mixtures: Sequence[Mixture], sites: Iterable[SiteSpec]
) -> Iterator[str]:
    """Yield what a plan takes and leaves of experts, if words such as `all-linear` are rules."""
    words = WORDS.intersection(rule.match for rule in config.targets)
    if words:
        taken = {site.name: site for site in sites}
        yield from left_out(words, mixtures, set(taken))
        yield from (_said(alike, set(taken)) for alike in _alike(mixtures))
        names = [name for mixture in mixtures for name in mixture.experts if name in taken]
        joined_up = [n for n in names if taken[n].kind == "parameter" and taken[n].experts is None]
        if joined_up:
            yield f"the experts of a matrix have one A: {_some(joined_up)}"


def left_out(words: Collection[str], mixtures: Sequence[Mixture], sites: set[str]) -> Iterator[str]:
    """Yield the experts that rules by a word leave out."""
    left = [name for mixture in mixtures for name in mixture.experts if name not in sites]
    if not left or not words:
        return
    if ALL_EXPERTS in words:
        yield f"not adapted of the experts: {_some(left)}"
    else:
        yield f"all-linear leaves out the experts {_some(left)}; add all-experts to adapt them"


def _some(names: Iterable[str]) -> str:
    """Return names, those that differ in numbers joined, and no more than four."""
    shown = list(templates(names))
    return quoted(shown[:4]) + (", ..." if len(shown) > 4 else "")


def _alike(mixtures: Iterable[Mixture]) -> Iterator[list[Mixture]]:
    """Yield the mixtures with the same numbers."""
    groups: dict[tuple[int, int | None], list[Mixture]] = {}
    for mixture in mixtures:
        groups.setdefault((mixture.n_experts, mixture.top_k), []).append(mixture)
    yield from groups.values()


def _said(mixtures: Sequence[Mixture], sites: set[str]) -> str:
    """Return the sentence about blocks with the same numbers of experts."""
    n_experts, top_k = mixtures[0].n_experts, mixtures[0].top_k
    meets = f", {top_k:,} of them for each token" if top_k else ", and it is not said how many"
    text = f"{counted(len(mixtures), 'block')} of {n_experts:,} experts{meets}"
    for what, names in (
        ("router", [name for m in mixtures for name in m.routers]),
        ("shared", [name for m in mixtures for name in m.shared]),
    ):
        for how, some in (
            ("adapted", [name for name in names if name in sites]),
            ("not adapted", [name for name in names if name not in sites]),
        ):
            if some:
                text += f"; {what} {how}: {_some(some)}"
    return text
