"""Make the site of a rule: its numbers, orientation, slices and rank."""

from __future__ import annotations

import math

from lora_inject.core.spec.config import HYPER, Active, Normal, Rule
from lora_inject.core.spec.inventory import Candidate
from lora_inject.core.spec.rooms import room
from lora_inject.core.spec.sites import FROM_WEIGHT, SiteSpec
from lora_inject.errors import MatchError


def site_of_rule(candidate: Candidate, rule: Rule, i: int, asked: str) -> SiteSpec:
    """Make the site that rule `i` asks for, or refuse a layout, slices or rank that do not fit.

    `rule` has the config's values filled in.
    """
    numbers = {key: getattr(rule, key) for key in HYPER}
    if isinstance(rule.init, Normal):
        numbers["init"] = ("normal", rule.init.normal)
    if isinstance(rule.rank, Active):
        numbers["rank"] = room("mixtures").rank_of_each(candidate, rule.rank.active, asked)
    if rule.only is not None or rule.share is not None:
        numbers |= room("mixtures").part_of_stack(candidate, rule, asked)
    shape, slices = candidate.geometry, None
    if rule.layout is not None or rule.slices is not None or candidate.needs_layout:
        from lora_inject.core.spec.layouts import oriented, sliced

        shape = oriented(candidate, rule, asked)
        slices = sliced(candidate, shape, rule, asked)
    site = SiteSpec(
        name=candidate.name,
        kind=candidate.kind,
        slices=slices,
        rule=i,
        weight=candidate.weight,
        update=candidate.update,
        aliases=candidate.aliases,
        **shape._asdict(),
        **numbers,
    )
    if site.variant != "lora" or site.lora_bias or site.init in FROM_WEIGHT or site.dropout:
        from lora_inject.core.spec.limits import reasons_against

        for reason in reasons_against(site):
            raise MatchError(asked, *reason)
    return site


def may_need_a_note(site: SiteSpec) -> bool:
    """Whether users should know something of a site: a wide rank, or a weight that is read."""
    narrow = min(site.in_features, *(stop - start for start, stop in site.spans))
    wide = site.rank > narrow or site.n_parameters > math.prod(site.weight_shape)
    return wide or site.update == "weight"
