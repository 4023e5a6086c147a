"""How entries that have no values yet get them.

An entry whose tensors are on the meta device, or were emptied, has no values until the state dict
of its module is loaded: it takes them from the dict if that holds the adapter, and else they start
from W as after inject.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Set
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_inject.core.adapter.first_factors import first_factors
from lora_inject.core.functional.factors import master_dtype
from lora_inject.core.functional.gain import norms_of
from lora_inject.core.layers.attached import Attached, Entry
from lora_inject.core.layers.library import dense
from lora_inject.core.layers.survey import base_tensor
from lora_inject.core.layers.weight_kinds import is_quantized, whole
from lora_inject.core.spec.sites import FROM_WEIGHT, SiteSpec
from lora_inject.core.spec.variants import VARIANTS

# The function that `to_empty` applies to each tensor: it gives memory and no values.
EMPTYING = {
    each for each in nn.Module.to_empty.__code__.co_consts if isinstance(each, types.CodeType)
}


def on_meta(module: nn.Module, entry: Entry) -> bool:
    """Return whether an entry has no memory."""
    return any(tensor.is_meta for tensor in entry.tensors(module).values())


def waiting(module: nn.Module, attached: Attached) -> list[Entry]:
    """Return the entries without values: on meta, or in memory that nobody has written to."""
    return [e for e in attached.entries() if e.mark in attached.garbage or on_meta(module, e)]


# ----------------------------------------------------------------------------- from a state dict


def names_given(module: nn.Module, state_dict: Mapping[str, object], prefix: str) -> set[str]:
    """Return the names, in a module, of the tensors that a state dict is about to give it.

    A tensor of an adapter that is the module's own already gives it nothing.
    """
    flat = module.__dict__["_lora"].flat
    there = {key.removeprefix(prefix): t for key, t in state_dict.items() if key.startswith(prefix)}
    return {name for name, t in there.items() if not (name in flat and is_own(module, name, t))}


def is_own(module: nn.Module, flat: str, tensor: Any) -> bool:
    """Return whether a tensor of a state dict is the module's own, which gives it no values.

    torch's `set_model_state_dict` fills a dict with what the model has.
    """
    own: Any = module._parameters[flat]
    mine, given = (getattr(t, "_local_tensor", t) for t in (own, tensor))
    if mine is given:
        return True
    plain = isinstance(mine, Tensor) and isinstance(given, Tensor)
    if not plain or mine.is_meta or given.is_meta or not mine.numel():
        return False
    return bool(mine.data_ptr() == given.data_ptr() and mine.shape == given.shape)


def start_loaded(module: nn.Module, entry: Entry, given: Set[str]) -> bool:
    """Start an entry that has got its W and not its values; return whether it has values now."""
    if given >= set(entry.names.values()) and not on_meta(module, entry):
        return True
    return entry.param in given and _start(module, entry)


@torch.no_grad()
def _start(module: nn.Module, entry: Entry) -> bool:
    """Write the first values of an entry, if its weight has values."""
    weight = base_tensor(module, entry.param)
    if weight.is_meta:
        return False
    held = entry.tensors(module)
    for role, value in first_values(module, entry, weight).items():
        if held[role].is_meta:
            new = nn.Parameter(value, held[role].requires_grad)
            module._parameters[entry.names[role]] = new
        else:
            copy_into([held[role]], [value])
    return True


@torch.no_grad()
def copy_into(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Write values into Parameters; of a sharded one each process writes its part."""
    for parameter, value in zip(parameters, values, strict=True):
        new, into = value, cast("Any", parameter)
        if hasattr(into, "full_tensor") and not hasattr(value, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            new = value.detach().to(into.device, into.dtype)  # the same in every process
            new = distribute_tensor(new, into.device_mesh, into.placements)
        parameter.copy_(new)


def first_values(module: nn.Module, entry: Entry, weight: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a new entry of a module by their roles, whole.

    A sharded W is gathered only where they are made of its values: all processes call this.
    """
    spec, dtype = entry.spec, master_dtype(weight.dtype)
    if spec is None:
        role = next(iter(entry.names))
        return {role: entry.start(_gathered(weight)).to(dtype, copy=True)}
    if spec.init in FROM_WEIGHT:
        weight = _gathered(weight)
    factors = first_factors(spec, weight, dtype)
    if spec.variant == "lora":
        return factors
    norms = partial(_first_norms, module, spec, weight)
    return {**factors, **VARIANTS[spec.variant].start(factors, norms)}


def _first_norms(module: nn.Module, spec: SiteSpec, weight: Tensor) -> Tensor:
    """Return the norms of the adapted outputs of W, equal in every bit to the first forward's."""
    weight = _gathered(weight)
    if is_quantized(weight):
        weight = dense(module, weight)
    matrix = weight.detach().reshape(spec.matrix_shape)
    if spec.update == "weight":
        matrix = matrix.to(torch.promote_types(weight.dtype, torch.float32))
    norms = norms_of(matrix, spec.transposed)
    return torch.cat([norms[start:stop] for start, stop in spec.spans])


def _gathered(weight: Tensor) -> Tensor:
    """Return W itself, a packed one as it is, or all of a sharded one."""
    return whole(weight) if hasattr(weight, "full_tensor") else weight
