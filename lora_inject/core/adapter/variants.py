"""Variants: how an adapter's tensors become an update of W, and how they start.

`W' = gain * (W + scale * (B A - B0 A0))`. A variant is a registered class and a row in
`spec.sites.ROLES`; forward, merging, files and counting follow from them. LoRA has no gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lora_inject.core.spec.sites import ROLES, Roles, ShapeOf, SiteSpec
from lora_inject.errors import LayerError


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
        from lora_inject.core.adapter.initial import initial_tensors  # for a new adapter only

        return initial_tensors(spec, weight, dtype)

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


def register_variant(cls: type[Variant]) -> type[Variant]:
    """Add a variant.

    Args:
        cls: A class with a `name` of its own, which configs and saved adapters can then use.

    Returns:
        The class, so that this can be used as a decorator.

    Raises:
        LayerError: The class has no name of its own, or its name is taken by another class.

    Examples:
        >>> class Same(Variant):
        ...     name = "same"
        >>> _ = register_variant(Same)
        >>> del VARIANTS["same"], ROLES["same"]
    """
    asked, name = f"register_variant({cls.__name__})", cls.__dict__.get("name")
    if not name or not issubclass(cls, Variant):
        problem = "it is not a Variant with a name of its own"
        raise LayerError(asked, problem, "Derive from Variant and set name")
    known = type(VARIANTS.get(name))
    same = (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
    if name in VARIANTS and not same:
        problem = f"variant {name!r} is {known.__module__}.{known.__qualname__}"
        raise LayerError(asked, problem, "Choose another name")
    VARIANTS[name], ROLES[name] = cls(), Roles(cls.roles, cls.gained)
    return cls


@register_variant
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
