"""Low-rank updates of looked-up rows.

The input of an embedding is a one-hot vector, so `x A^T` is a lookup in A.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.core.functional.factors import (
    Update,
    compute_dtype,
    no_view,
    without_autocast,
)
from lora_inject.core.functional.plain_operations import plus_product


def embedding(
    base: Tensor,
    ids: Tensor,
    updates: Sequence[Update],
    padding_idx: int | None,
    *,
    float32: bool = False,
) -> Tensor:
    """Add low-rank updates to looked-up rows: `base + scale * A[:, ids]^T B^T`, out of place.

    `base` is `(..., dim)` of the frozen table for ids `(...)`; A is `(rank, num)`, B `(dim, rank)`.
    Dropout drops whole tokens, because the input of A is a one-hot vector. The row `padding_idx`
    receives no gradient, as in `nn.Embedding`.
    """
    dtype = compute_dtype(base.dtype, float32)
    out = base.reshape(-1, base.shape[-1])
    with without_autocast(base) or nullcontext():
        for u in updates:
            h = F.embedding(ids.reshape(-1), u.A.t())
            if u.dropout:
                h = h * F.dropout(h.new_ones(len(h), 1), u.dropout)
            out = plus_product(out, h.to(dtype), u.B.to(dtype).t(), u.scale)
    if padding_idx is not None:
        # Padding tokens get the updates but no gradient, as in the dense table.
        out = torch.where((ids.reshape(-1, 1) == padding_idx), out.detach(), out)
    # Not a view, like a plain embedding's output: wrappers that shard warn of views. The memory is
    # not shared.
    return no_view(out, base.shape)
