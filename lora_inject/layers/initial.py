"""How A and B start.

One factor starts at zero, so that the adapted layer starts as the plain one, and the
other is random. For a linear layer B is zero (paper, section 4.1); for an embedding A is, so that
tokens which training never sees keep their rows (loralib `layers.Embedding`).

pissa (arXiv:2404.02948) and olora (arXiv:2406.01775) start from factors of W instead. They do not
write W here: a frozen copy A0, B0 of the start is kept, and the site computes
`W + scale * (B A - B0 A0)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lora_inject.errors import LayerError
from lora_inject.functional import master_dtype
from lora_inject.spec.sites import SiteSpec

FROM_WEIGHT = ("pissa", "olora")


def initial_tensors(spec: SiteSpec, weight: Tensor) -> dict[str, Tensor]:
    """Make the tensors of a new site.

    Returns:
        Role to tensor: `A` of `spec.a_shape`, `B` of `spec.b_shape`, and for pissa and olora the
        frozen `A0` and `B0`. float32, or float64 over a float64 weight; on the weight's device.
    """
    dtype = master_dtype(weight.dtype)
    if spec.init in FROM_WEIGHT:
        if weight.device.type == "meta":
            raise LayerError(
                f"init {spec.init} of site {spec.name!r}",
                "the weight is on the meta device and has no values to start from",
                "Load the base weights first",
            )
        return _from_weight(spec, weight, dtype)
    device = weight.device
    A = torch.empty(spec.a_shape, dtype=dtype, device=device)
    B = torch.empty(spec.b_shape, dtype=dtype, device=device)
    if device.type != "meta":  # else there are no values, and torch would take long to say so
        zero, random = (A, B) if spec.kind == "embedding" else (B, A)
        zero.zero_()
        _randomise(random, spec)
    return {"A": A, "B": B}


def _randomise(tensor: Tensor, spec: SiteSpec) -> None:
    if spec.init == "kaiming":
        if spec.kind == "embedding":
            tensor.normal_()
        else:
            # kaiming_uniform_(a=sqrt(5)) of the paper's code is this bound.
            bound = 1.0 / math.sqrt(spec.in_features)
            tensor.uniform_(-bound, bound)
    else:
        tensor.normal_(0.0, spec.init[1] if isinstance(spec.init, tuple) else 1.0 / spec.rank)


def _from_weight(spec: SiteSpec, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    factor = _FACTORS[str(spec.init)]
    A = torch.empty(spec.a_shape, dtype=dtype, device=weight.device)
    B = torch.empty(spec.b_shape, dtype=dtype, device=weight.device)
    matrix = weight.detach().reshape(spec.matrix_shape)
    A2, B2 = A.view(-1, spec.in_features), B.view(-1, spec.rank)
    for block in spec.blocks:
        part = matrix[slice(*block.rows), slice(*block.cols)].to(dtype)
        b, a = factor(part.t() if spec.transposed else part, spec.rank, spec.scale)
        A2[slice(*block.a)], B2[slice(*block.b)] = a, b
    return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}


def _pissa(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return `(B, A)` with `scale * B A` the best approximation of W of that rank."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[:rank] / scale).sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


def _olora(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return `(B, A)`, the leading columns of Q and rows of R of W."""
    del scale
    Q, R = torch.linalg.qr(W)
    return Q[:, :rank], R[:rank]


_FACTORS: Mapping[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]] = {
    "pissa": _pissa,
    "olora": _olora,
}
