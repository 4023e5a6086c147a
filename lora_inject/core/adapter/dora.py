"""DoRA, the variant with a magnitude for each output."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lora_inject.core.adapter.variants import Variant
from lora_inject.core.spec.sites import ROLES


class Dora(Variant):
    """DoRA (arXiv:2402.09353): `W' = m * (W + scale * B A) / |W + scale * B A|`.

    The magnitude m, one number for each output, starts as the norm of W over the inputs; no
    gradient flows through the norm (section 4.3).
    """

    name = "dora"
    roles, gained = ROLES["dora"]

    def start(
        self, factors: Mapping[str, Tensor], norms: Callable[[], Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the magnitude."""
        return {"m": norms().to(factors["B"].dtype)}

    def gain(self, tensors: Mapping[str, Tensor], norms: Tensor) -> Tensor:
        """Return `m / norms`; an output of zeros stays zero."""
        return tensors["m"] / norms.clamp(min=1e-30)
