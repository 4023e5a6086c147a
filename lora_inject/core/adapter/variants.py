"""Variants: how an adapter's tensors become an update of W, and how they start.

`W' = gain * (W + scale * (B A - B0 A0))`. A variant is a registered class and a row in
`spec.sites.ROLES`; forward, merging, files and counting follow from them. LoRA has no gain, and
asks nothing of its class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor

from lora_inject.core.spec.sites import ROLES, ShapeOf


class Variant:
    """LoRA, `W + scale * B A`, and the base of every other variant.

    Attributes:
        name: What a config calls it.
        roles: Tensors that it trains besides A and B: role to a function of the shapes of A and B.
        gained: Whether the variant has a gain. The first axis of each of `roles` is then that of
            the adapted outputs, and no other adapter can be active at the same site.
    """

    name: ClassVar[str] = "lora"
    roles: ClassVar[Mapping[str, ShapeOf]] = ROLES["lora"].further
    gained: ClassVar[bool] = False

    def start(
        self, factors: Mapping[str, Tensor], norms: Callable[[], Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the tensors of `roles` for a new site, with which it computes what it did.

        Args:
            factors: A and B as they start, by role; the others are to have their dtype and device.
            norms: Returns the norm of each adapted output of W over its inputs, `(adapted out,)`.
        """
        del factors, norms
        return {}

    def gain(self, tensors: Mapping[str, Tensor], norms: Tensor) -> Tensor:
        """Return the gain of some outputs; called only for variants that are `gained`.

        Args:
            tensors: By role, the rows of those outputs.
            norms: `|W + scale * (B A - B0 A0)|` of those outputs over their inputs, `(n,)`, without
                a gradient.

        Returns:
            `(n,)`.
        """
        raise NotImplementedError
