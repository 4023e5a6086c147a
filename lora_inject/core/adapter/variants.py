"""Variants: how an adapter's tensors become an update of W, and how they start.

`W' = gain * (W + scale * (B A - B0 A0))`. A variant is a registered class and a row in
`spec.sites.ROLES`; forward, merging, files and counting follow from them. LoRA has no gain.

One factor starts at zero, so that the adapted layer starts equal to the plain one; the other is
random. For a linear layer B is zero (paper, section 4.1). For an embedding A is zero, so that
tokens that do not occur in training keep their rows (loralib `layers.Embedding`).

pissa (arXiv:2404.02948) and olora (arXiv:2406.01775) start from factors of W instead. They do not
write W here: a frozen copy A0, B0 of the start is kept, and the site computes
`W + scale * (B A - B0 A0)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lora_inject.core.spec.sites import FROM_WEIGHT, ROLES, Roles, ShapeOf, SiteSpec
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
        found = "it is not a Variant with a name of its own"
        raise LayerError(asked, found, "Derive from Variant and set name")
    known = type(VARIANTS.get(name))
    same = (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
    if name in VARIANTS and not same:
        found = f"variant {name!r} is {known.__module__}.{known.__qualname__}"
        raise LayerError(asked, found, "Choose another name")
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


def initial_tensors(spec: SiteSpec, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return A and B of a new site, and for pissa and olora the frozen A0 and B0, on W's device."""
    if spec.init in FROM_WEIGHT and weight.device.type == "meta":
        raise LayerError(
            f"init {spec.init} of site {spec.name!r}",
            "the weight is on the meta device and has no values to start from",
            "Load the base weights first",
        )
    A = torch.empty(spec.a_shape, dtype=dtype, device=weight.device)
    B = torch.empty(spec.b_shape, dtype=dtype, device=weight.device)
    if spec.init in FROM_WEIGHT:
        _factorize(weight.detach().reshape(spec.matrix_shape), A, B, spec)
        return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}
    if weight.device.type != "meta":  # there are no values, and torch would be slow
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


def _factorize(W: Tensor, A: Tensor, B: Tensor, spec: SiteSpec) -> None:
    """Fill A and B with factors of each block of W."""
    A, B = A.view(-1, spec.in_features), B.view(-1, spec.rank)
    for block in spec.blocks:
        part = W[slice(*block.rows), slice(*block.cols)].to(A.dtype)
        part = part.t() if spec.transposed else part
        if spec.init == "pissa":  # scale * B @ A is the best approximation of W of that rank
            U, S, Vh = torch.linalg.svd(part, full_matrices=False)
            root = (S[: spec.rank] / spec.scale).sqrt()
            b, a = U[:, : spec.rank] * root, root[:, None] * Vh[: spec.rank]
        else:  # olora: the leading columns of Q and rows of R
            Q, R = torch.linalg.qr(part)
            b, a = Q[:, : spec.rank], R[: spec.rank]
        A[slice(*block.a)], B[slice(*block.b)] = a, b
