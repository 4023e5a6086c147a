"""How entries that have no values yet get them.

An entry without values (`layers.valueless`) gets them where its module gets its own: by
`reset_parameters` of the layer, or by `load_state_dict`, from the dict if that holds the adapter,
and else by its init. A magnitude and a trained copy start from W. After `reset_parameters` they
start again when W is loaded, unless somebody has written to them in between.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.adapter.first_factors import first_factors
from lora_inject.core.adapter.variants import VARIANTS
from lora_inject.core.functional.factors import master_dtype
from lora_inject.core.layers.attached import Attached, Entry, attached_to
from lora_inject.core.layers.forms import is_own
from lora_inject.core.layers.gains import first_norms
from lora_inject.core.layers.own_code import keeping
from lora_inject.core.layers.survey import base_tensor
from lora_inject.core.spec.sites import FROM_WEIGHT


def names_given(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> set[str]:
    """Return the names, in a module, of the tensors that a state dict is about to give it.

    A tensor of an adapter that is the module's own already gives it nothing.
    """
    there = {key.removeprefix(prefix): t for key, t in state_dict.items() if key.startswith(prefix)}
    return {name for name, tensor in there.items() if not _is_ours(module, name, tensor)}


def start_loaded(module: nn.Module, present: Collection[str]) -> None:
    """Start what has got its W from a state dict, and note what has got values itself."""
    attached = attached_to(module)
    assert attached is not None
    whole = [e for e in attached.entries() if all(flat in present for flat in e.names.values())]
    given_values(module, [entry for entry in whole if not _on_meta(module, entry)])
    restart = [entry for entry in attached.entries() if _as_reset(module, attached, entry)]
    waiting = [entry for entry in attached.entries() if entry.mark in attached.valueless]
    entries = [entry for entry in (*waiting, *restart) if entry.param in present]
    _start(module, entries)
    given_values(module, entries)


def _is_ours(module: nn.Module, name: str, tensor: Any) -> bool:
    """Whether a state dict gives a module a tensor of an adapter that it has already."""
    attached = attached_to(module)
    assert attached is not None
    return name in attached.flat and is_own(module, name, tensor)


def _as_reset(module: nn.Module, attached: Attached, entry: Entry) -> bool:
    """Whether an entry has the values that `reset_parameters` gave it from W."""
    return attached.by_reset.get(entry.mark) == _versions(module, entry)


def _versions(module: nn.Module, entry: Entry) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in entry.tensors(module).values())


def _on_meta(module: nn.Module, entry: Entry) -> bool:
    return any(tensor.is_meta for tensor in entry.tensors(module).values())


@torch.no_grad()
def start_reset(module: nn.Module) -> None:
    """Start the entries of a layer whose `reset_parameters` has just run."""
    attached = attached_to(module)
    assert attached is not None
    entries = [entry for entry in attached.entries() if entry.mark in attached.valueless]
    _start(module, entries)
    started = [entry for entry in entries if not _on_meta(module, entry)]
    given_values(module, started)
    follow = {entry.mark: _versions(module, entry) for entry in started if _follows_weight(entry)}
    attached.by_reset = {**attached.by_reset, **follow}


def _follows_weight(entry: Entry) -> bool:
    if entry.spec is None:
        return entry.scale is None
    return entry.gained or entry.spec.init in FROM_WEIGHT


@torch.no_grad()
def _start(module: nn.Module, entries: Iterable[Entry]) -> None:
    """Write the first values of entries whose weight has values."""
    for entry in entries:
        weight: Any = base_tensor(module, entry.param)
        if weight.is_meta:
            continue
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        values = first_values(module, entry, weight)
        held = entry.tensors(module)
        for role, value in values.items():
            if held[role].is_meta:
                new = nn.Parameter(value, held[role].requires_grad)
                module._parameters[entry.names[role]] = new
        real = {role: value for role, value in values.items() if not held[role].is_meta}
        copy_into((held[role] for role in real), real.values())


@torch.no_grad()
def copy_into(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Write values into Parameters; of a sharded one each process writes its part."""
    for parameter, value in zip(parameters, values, strict=True):
        sharded = hasattr(parameter, "full_tensor")
        if sharded and not hasattr(value, "full_tensor"):
            write_into_shards(parameter, value)
        else:
            parameter.copy_(value)


def write_into_shards(parameter: Any, value: Tensor) -> None:
    """Write a whole value, the same in every process, into a sharded Parameter."""
    from torch.distributed.tensor import distribute_tensor

    value = value.detach().to(parameter.device, parameter.dtype)
    mesh, placements = parameter.device_mesh, parameter.placements
    parameter.copy_(distribute_tensor(value, mesh, placements))


def reset(module: nn.Module, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the plain class's `reset_parameters`, which finds the parameters themselves."""
    attached = module.__dict__["_lora"]
    with keeping(attached):
        result = plain(module, *args, **kwargs)
    if attached.valueless:
        start_reset(module)
    return result


# The function that `to_empty` applies to each tensor: it gives memory and no values.
EMPTYING = {
    each for each in nn.Module.to_empty.__code__.co_consts if isinstance(each, types.CodeType)
}


def moved(module: nn.Module, *, emptied: bool) -> None:
    """Note which entries of a module have values after its tensors were moved."""
    attached = attached_to(module)
    assert attached is not None
    for entry in attached.entries():
        on_meta = any(tensor.is_meta for tensor in entry.tensors(module).values())
        if on_meta or emptied:
            attached.valueless |= {entry.mark}
    _note_garbage(module, attached)


def _note_garbage(module: nn.Module, attached: Attached) -> None:
    """Note what has memory and no values."""
    attached.garbage = frozenset(
        entry.mark
        for entry in attached.entries()
        if entry.mark in attached.valueless
        and not any(tensor.is_meta for tensor in entry.tensors(module).values())
    )
    if attached.garbage:
        attached.forget_use()


def given_values(module: nn.Module, entries: Iterable[Entry]) -> None:
    """Note that entries have got values."""
    attached = attached_to(module)
    assert attached is not None
    marks = {entry.mark for entry in entries}
    if marks & (attached.valueless | attached.by_reset.keys()):
        attached.valueless -= marks
        attached.by_reset = {m: v for m, v in attached.by_reset.items() if m not in marks}
        _note_garbage(module, attached)


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
