"""A and B of a new site.

One factor starts at zero, so that the adapted layer starts equal to the plain one; the other is
random. For a linear layer B is zero (paper, section 4.1). For an embedding A is zero, so that
tokens that do not occur in training keep their rows (loralib `layers.Embedding`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_inject.core.spec.sites import FROM_WEIGHT, SiteSpec
from lora_inject.errors import LayerError


def first_factors(spec: SiteSpec, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return A and B of a new site, and for pissa and olora the frozen A0 and B0, on W's device."""
    device = weight.device
    A = torch.empty(spec.a_shape, dtype=dtype, device=device)
    B = torch.empty(spec.b_shape, dtype=dtype, device=device)
    if spec.init in FROM_WEIGHT:
        if weight.is_meta:
            asked = f"init {spec.init} of site {spec.name!r}"
            problem = "the weight is on the meta device and has no values to start from"
            raise LayerError(asked, problem, "Load the base weights first")
        _factorize(weight.detach(), A, B, spec)
        return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}
    if device.type != "meta":  # there are no values, and torch would be slow
        zero, random = (A, B) if spec.kind == "embedding" else (B, A)
        zero.zero_()
        _randomize(random, spec)
    return {"A": A, "B": B}


def _randomize(tensor: Tensor, spec: SiteSpec) -> None:
    if isinstance(spec.init, tuple):
        tensor.normal_(0.0, spec.init[1])
    elif spec.init == "gaussian":
        tensor.normal_(0.0, 1.0 / spec.rank)
    elif spec.init != "kaiming":
        raise _no_start(spec)
    elif spec.kind == "embedding":
        tensor.normal_()
    else:  # kaiming_uniform_(a=sqrt(5)) of the paper's code is this bound
        bound = 1.0 / math.sqrt(spec.in_features)
        tensor.uniform_(-bound, bound)


def _no_start(spec: SiteSpec) -> LayerError:
    asked = f"init {spec.init!r} of site {spec.name!r}"
    return LayerError(asked, "no function starts A so", "Name an init of the config's schema")


def _factorize(weight: Tensor, A: Tensor, B: Tensor, spec: SiteSpec) -> None:
    """Fill A and B with factors of each block of W."""
    W = weight.reshape(spec.matrix_shape)
    A, B = A.view(-1, spec.in_features), B.view(-1, spec.rank)
    for block in spec.blocks:
        part = W[slice(*block.rows), slice(*block.cols)].to(A.dtype)
        part = part.t() if spec.transposed else part
        if spec.init == "pissa":  # scale * B @ A is the best approximation of W of that rank
            U, S, Vh = torch.linalg.svd(part, full_matrices=False)
            root = (S[: spec.rank] / spec.scale).sqrt()
            b, a = U[:, : spec.rank] * root, root[:, None] * Vh[: spec.rank]
        elif spec.init == "olora":  # the leading columns of Q and rows of R
            Q, R = torch.linalg.qr(part)
            b, a = Q[:, : spec.rank], R[: spec.rank]
        else:
            raise _no_start(spec)
        A[slice(*block.a)], B[slice(*block.b)] = a, b
