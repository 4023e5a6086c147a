"""Which tensor of an adapter has values that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.functional.finite import all_finite
from lora_inject.errors import LoraInjectError


def first_without_values(
    sites: Mapping[str, SiteState],
    trained: Mapping[str, Tensor],
    asked: str,
    error: type[LoraInjectError],
) -> LoraInjectError:
    """Return the error of the first tensor that is on the meta device, or not finite."""
    tensors = {
        f"{role} of site {name!r}": tensor
        for name, site in sites.items()
        for role, tensor in site.tensors.items()
    }
    tensors |= {f"trained tensor {name!r}": tensor for name, tensor in trained.items()}
    name, tensor = next(
        (name, tensor)
        for name, tensor in tensors.items()
        if tensor.is_meta or not all_finite(tensor)
    )
    where = f"{asked}, {name}" if asked else name
    if tensor.is_meta:
        return error(where, "it is on the meta device and has no values", "Load its values first")
    problem = f"it holds {int((~torch.isfinite(tensor)).sum()):,} NaN or infinite values"
    return error(where, problem, "Its training diverged; take an earlier checkpoint of the adapter")
