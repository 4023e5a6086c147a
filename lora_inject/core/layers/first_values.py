"""The values that a new adapter begins with at one place of a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_inject.core.functional.factors import master_dtype
from lora_inject.core.functional.gain import norms_of
from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.packed_weights import dense
from lora_inject.core.layers.plain_tensors import is_quantized
from lora_inject.core.spec.sites import SiteSpec


def first_values(module: nn.Module, entry: Entry, weight: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a new entry of a module by their roles; `weight` is W, whole."""
    spec, dtype = entry.spec, master_dtype(weight.dtype)
    if spec is None:
        role = next(iter(entry.names))
        return {role: entry.start(weight).to(dtype, copy=True)}
    return entry.variant.start(spec, weight, dtype, lambda: _norms(module, spec, weight))


def _norms(module: nn.Module, spec: SiteSpec, weight: Tensor) -> Tensor:
    """Return the norms of the adapted outputs of W, equal in every bit to the first forward's."""
    if is_quantized(weight):
        weight = dense(module, weight)
    matrix = weight.detach().reshape(spec.matrix_shape)
    if spec.update == "weight":
        matrix = matrix.to(torch.promote_types(weight.dtype, torch.float32))
    norms = norms_of(matrix, spec.transposed)
    return torch.cat([norms[start:stop] for start, stop in spec.spans])
