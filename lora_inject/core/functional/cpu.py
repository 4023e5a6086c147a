"""Faster operations for CPUs, chosen by the device, the dtypes and the number of tokens.

`linear` is correct on every device; these operations give the same values in less time. Another
one is worth adding if it takes two percentage points off a training step of a Llama (3 blocks of
width 768, 512 tokens, rank 8) on one core.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_inject.core.functional.factors import Update

# Tokens of a decoding step.
FEW = 32


def is_cpu(t: Tensor) -> bool:
    """Whether a tensor is on a CPU and no DTensor, which has fewer operations: it is asked here."""
    return t.device.type == "cpu" and not hasattr(t, "full_tensor")


def are_few(x: Tensor, u: Update) -> bool:
    """Whether x has so few tokens that time is in the number of operations."""
    if x.numel() > FEW * x.shape[-1] or u.dropout or u.spans is not None or not is_cpu(x):
        return False
    return x.dtype.itemsize > 2 and x.dtype == u.A.dtype == u.B.dtype


def add_few_(y: Tensor, x: Tensor, u: Update) -> Tensor:
    """Add an update to the output of few tokens in place, where all have one dtype.

    A single token is a vector: decoding one token of a layer of width 768 takes half as long as
    with the operations of `linear`. It is done with gradients on as well, so that a token has the
    same bits. Returns `x A^T`, `(n, rank)`; y is contiguous.
    """
    if x.numel() == x.shape[-1]:
        vector = torch.mv(u.A, x.reshape(-1))
        y.view(-1).addmv_(u.B, vector, alpha=u.scale)
        return vector[None]
    # As a matrix: else torch would choose its product by `A.requires_grad`.
    h = torch.mm(x.reshape(-1, x.shape[-1]), u.A.t())
    y.view(-1, y.shape[-1]).addmm_(h, u.B.t(), alpha=u.scale)
    return h
