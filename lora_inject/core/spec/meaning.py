"""What two sites must have in common for values of A and B to mean the same in both."""

from __future__ import annotations

from lora_inject.core.spec.sites import SiteSpec


def meaning(spec: SiteSpec) -> tuple[object, ...]:
    """Return it but for the rank and the scale: parts, experts, orientation, variant, bias."""
    turned = spec.kind == "parameter" and spec.transposed
    common = (spec.spans, spec.experts, turned, spec.variant, spec.lora_bias)
    return (*common, spec.only, spec.share) if spec.only or spec.share else common
