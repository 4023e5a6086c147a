"""The values that a new adapter begins with at one place of a module."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from lora_inject.core.adapter.first_factors import first_factors
from lora_inject.core.adapter.known_variants import VARIANTS
from lora_inject.core.functional.factors import master_dtype
from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.gains import first_norms


def first_values(module: nn.Module, entry: Entry, weight: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a new entry of a module by their roles; `weight` is W, whole."""
    spec, dtype = entry.spec, master_dtype(weight.dtype)
    if spec is None:
        role = next(iter(entry.names))
        return {role: entry.start(weight).to(dtype, copy=True)}
    factors = first_factors(spec, weight, dtype)
    if spec.variant == "lora":
        return factors
    norms = partial(first_norms, module, spec, weight)
    return {**factors, **VARIANTS[spec.variant].start(factors, norms)}
