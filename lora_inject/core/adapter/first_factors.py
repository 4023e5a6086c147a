"""A and B of a new site.

One factor starts at zero, so that the adapted layer starts equal to the plain one; the other is
random. For a linear layer B is zero (paper, section 4.1). For an embedding A is zero, so that
tokens that do not occur in training keep their rows (loralib `layers.Embedding`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_inject.core.adapter.from_weight import factorize
from lora_inject.core.spec.sites import FROM_WEIGHT, SiteSpec


def first_factors(spec: SiteSpec, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return A and B of a new site, and for pissa and olora the frozen A0 and B0, on W's device."""
    device = weight.device
    A = torch.empty(spec.a_shape, dtype=dtype, device=device)
    B = torch.empty(spec.b_shape, dtype=dtype, device=device)
    if spec.init in FROM_WEIGHT:
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
