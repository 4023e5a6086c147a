"""Sites whose update is a product of two factors and nothing else."""

from __future__ import annotations

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.errors import StateError


def plain(site: SiteState, asked: str, *, bias: bool = False) -> SiteState:
    """Refuse a site whose update is not a product of A and B alone, as DoRA's is not.

    A bias of B is accepted where the caller asks for it, if the site has no slices.
    """
    allowed = {"A", "B", "A0", "B0"} | ({"b"} if bias and site.spec.slices is None else set())
    further = sorted(set(site.tensors) - allowed)
    if further or site.spec.variant != "lora":
        raise StateError(
            f"{asked}, site '{site.spec.name}'",
            f"its update is not B @ A alone (variant {site.spec.variant}, with {further})",
            "Merge it into the base instead: merge(model), or `lora-inject merge`",
        )
    return site
