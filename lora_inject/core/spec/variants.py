"""Variants: how an adapter's tensors become an update of W, and how they start.

`W' = gain * (W + scale * (B A - B0 A0))`. A variant is one class and its row in `VARIANTS`:
planning, forward, merging, files and counting follow from it. LoRA has no gain, and asks nothing of
its class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from lora_inject.errors import LayerError

if TYPE_CHECKING:  # a config is read without torch
    from torch import Tensor

Shape = tuple[int, ...]
ShapeOf = Callable[[Shape, Shape], Shape]
"""The shape of a tensor, by those of A `(..., rank, in)` and B `(..., out, rank)`."""


class Variant:
    """LoRA, `W + scale * B A`, and the base of every other variant.

    Attributes:
        name: What a config calls it.
        roles: Tensors that it trains besides A and B: role to a function of the shapes of A and B.
        gained: Whether the variant has a gain. The first axis of each of `roles` is then that of
            the adapted outputs, and no other adapter can be active at the same site.
    """

    name: ClassVar[str] = "lora"
    roles: ClassVar[Mapping[str, ShapeOf]] = {}
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


class Dora(Variant):
    """DoRA (arXiv:2402.09353): `W' = m * (W + scale * B A) / |W + scale * B A|`.

    The magnitude m, one number for each output, starts as the norm of W over the inputs; no
    gradient flows through the norm (section 4.3).
    """

    name = "dora"
    roles: ClassVar = {"m": lambda a, b: b[:-1]}  # noqa: ARG005 - one for each output
    gained = True

    def start(
        self, factors: Mapping[str, Tensor], norms: Callable[[], Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the magnitude."""
        return {"m": norms().to(factors["B"].dtype)}

    def gain(self, tensors: Mapping[str, Tensor], norms: Tensor) -> Tensor:
        """Return `m / norms`, and 0 for an output of zeros: in 16 bits `m / 1e-30` would be Inf."""
        return tensors["m"] / norms.clamp(min=1e-30) * (norms > 0)


VARIANTS: dict[str, Variant] = {"lora": Variant(), "dora": Dora()}
"""Those of the package and those from outside, by name."""


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
        >>> del VARIANTS["same"]
    """
    asked, name = f"register_variant({cls.__name__})", cls.__dict__.get("name")
    if not name or not issubclass(cls, Variant):
        problem = "it is not a Variant with a name of its own"
        raise LayerError(asked, problem, "Derive from Variant and set name")
    if taken := {"A", "B", "A0", "B0", "b"} & cls.roles.keys():
        problem = f"its role {min(taken)!r} is that of every site"
        raise LayerError(asked, problem, "Choose another name for it")
    known = type(VARIANTS[name]) if name in VARIANTS else cls
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        problem = f"variant {name!r} is {known.__module__}.{known.__qualname__}"
        raise LayerError(asked, problem, "Choose another name")
    VARIANTS[name] = cls()
    return cls
