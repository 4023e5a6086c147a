"""DoRA, the variant with a magnitude for each output."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lora_inject.core.adapter.variants import Variant
from lora_inject.core.spec.sites import ROLES, SiteSpec


class Dora(Variant):
    """DoRA (arXiv:2402.09353): `W' = m * (W + scale * B A) / |W + scale * B A|`.

    The magnitude m, one number for each output, starts as the norm of W over the inputs; no
    gradient flows through the norm (section 4.3).
    """

    name = "dora"
    roles, gained = ROLES["dora"]

    def start(
        self, spec: SiteSpec, weight: Tensor, dtype: torch.dtype, norms: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        """Return A, B and the magnitude; the layer starts equal to the plain one."""
        return {**super().start(spec, weight, dtype, norms), "m": norms().to(dtype)}

    def gain(self, tensors: Mapping[str, Tensor], norms: Tensor) -> Tensor:
        """Return `m / norms`; an output of zeros stays zero."""
        return tensors["m"] / norms.clamp(min=1e-30)
