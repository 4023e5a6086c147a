"""Variants: how an adapter's tensors become an update of W, and how they start.

`W' = gain * (W + scale * (B A - B0 A0))`. A variant is a registered class and a row in
`spec.sites.ROLES`; forward, merging, files and counting follow from them. LoRA has no gain.

One factor starts at zero, so that the adapted layer starts equal to the plain one; the other is
random. For a linear layer B is zero (paper, section 4.1). For an embedding A is zero, so that
tokens that do not occur in training keep their rows (loralib `layers.Embedding`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lora_inject.core.spec.rooms import the_one
from lora_inject.core.spec.sites import FROM_WEIGHT, ROLES, ShapeOf, SiteSpec


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
        self, spec: SiteSpec, weight: Tensor, dtype: torch.dtype, norms: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        """Return the tensors of a new site by their roles.

        Args:
            spec: The site.
            weight: W.
            dtype: Dtype of the tensors.
            norms: Returns the norm of each adapted output of W over its inputs, `(adapted out,)`.
        """
        del norms
        return _initial_tensors(spec, weight, dtype)

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


VARIANTS: dict[str, Variant] = {"lora": Variant()}
"""LoRA, and those from outside the package."""


_OF_THE_PACKAGE = {"dora": "lora_inject.core.adapter.dora:Dora"}


def variant_of(name: str) -> Variant:
    """Return the variant of a name; those of the package but LoRA are imported when asked for."""
    return VARIANTS.get(name) or the_one(_OF_THE_PACKAGE[name])


def _initial_tensors(spec: SiteSpec, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return A and B of a new site, and for pissa and olora the frozen A0 and B0, on W's device."""
    device = weight.device
    A = torch.empty(spec.a_shape, dtype=dtype, device=device)
    B = torch.empty(spec.b_shape, dtype=dtype, device=device)
    if spec.init in FROM_WEIGHT:
        from lora_inject.core.adapter.from_weight import factorize

        factorize(weight.detach(), A, B, spec)
        return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}
    if device.type != "meta":  # there are no values, and torch would be slow
        zero, random = (A, B) if spec.kind == "embedding" else (B, A)
        zero.zero_()
        _randomize(random, spec)
    return {"A": A, "B": B}


def _randomize(tensor: Tensor, spec: SiteSpec) -> None:
    if spec.init != "kaiming":
        tensor.normal_(0.0, spec.init[1] if isinstance(spec.init, tuple) else 1.0 / spec.rank)
    elif spec.kind == "embedding":
        tensor.normal_()
    else:  # kaiming_uniform_(a=sqrt(5)) of the paper's code is this bound
        bound = 1.0 / math.sqrt(spec.in_features)
        tensor.uniform_(-bound, bound)
