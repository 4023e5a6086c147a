"""How the factors of a new site start from those of W.

pissa (arXiv:2404.02948) and olora (arXiv:2406.01775) do. They do not write W here: a frozen copy
A0, B0 of the start is kept, and the site computes `W + scale * (B A - B0 A0)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import LayerError


def factorize(weight: Tensor, A: Tensor, B: Tensor, spec: SiteSpec) -> None:
    """Fill A and B with factors of each block of W.

    Raises:
        LayerError: W is on the meta device.
    """
    if weight.is_meta:
        raise LayerError(
            f"init {spec.init} of site {spec.name!r}",
            "the weight is on the meta device and has no values to start from",
            "Load the base weights first",
        )
    W = weight.reshape(spec.matrix_shape)
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
