"""What a site cannot have, and what users should know of one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lora_inject.core.spec.inventory import Candidate
from lora_inject.core.spec.names import counted
from lora_inject.core.spec.sites import FROM_WEIGHT, ROLES, SiteSpec
from lora_inject.errors import article

BIASED_KINDS = ("linear", "conv1d", "conv")


def why_no_gain(site: SiteSpec) -> str:
    """Return why the outputs of a site cannot have a gain, or ""."""
    if site.experts is not None:
        return f"a stack of {site.experts:,} matrices"
    if site.kind == "conv_transpose":
        return "a transposed convolution, whose outputs are not rows or columns of its weight"
    return ""


def reasons_against(site: SiteSpec) -> Iterator[tuple[str, str]]:
    """Yield which of a rule's values a site cannot have, and what to give instead."""
    if site.update == "weight" and site.dropout:
        problem = f"dropout {site.dropout:g} on a weight that is read, not called with inputs"
        yield problem, "Give the rule dropout: 0"
    if site.lora_bias and (site.slices or site.variant != "lora" or site.kind not in BIASED_KINDS):
        what = f"variant {site.variant}" if site.variant != "lora" else article(site.kind)
        yield f"lora_bias on {'slices' if site.slices else what}", "Give the rule lora_bias: false"
    if ROLES[site.variant].gained and (why := why_no_gain(site)):
        yield f"variant {site.variant} on {why}", "Give the rule variant: lora"
    if site.init in FROM_WEIGHT and site.rank > (most := _narrow_side(site)):
        problem = f"init {site.init} with rank {site.rank}, but W has a rank of at most {most}"
        yield problem, f"Give the rule rank: {most}, or another init"


def _narrow_side(site: SiteSpec) -> int:
    """Return the smallest side of the matrices that B @ A updates."""
    return min(site.in_features, *(stop - start for start, stop in site.spans))


def notes(candidates: Sequence[Candidate], sites: Sequence[SiteSpec]) -> Iterator[str]:
    """Yield notes about the sites for the user, in sentences."""
    wide = [site for site in sites if site.rank > _narrow_side(site)]
    if wide:
        yield (
            f"the rank is above the smaller side of {_several(wide)}; a rank of that side can "
            "express every update"
        )
    above = [site for site in sites if site.n_parameters > math.prod(site.weight_shape)]
    if full := [site for site in above if site.rank <= _narrow_side(site)]:
        yield f"A and B have more elements than W at {_several(full)}"
    pairs = zip(candidates, sites, strict=True)
    read = (c for c, site in pairs if site.update == "weight" and site.compute == "base")
    if rounded := [c.dtype for c in read if c.dtype in ("bfloat16", "float16")]:
        yield (
            f"{counted(len(rounded), 'weight update')} over {rounded[0]}: W + delta is rounded on "
            "every read; compute: float32 keeps small deltas"
        )


def _several(sites: Sequence[SiteSpec]) -> str:
    first = f"'{sites[0].name}' ({sites[0].in_features:,} -> {sites[0].out_features:,})"
    return first if len(sites) == 1 else f"{len(sites):,} sites, first {first}"
