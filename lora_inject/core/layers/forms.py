"""What a state dict says of adapters besides their tensors, and which one may be loaded.

Tensors tell neither a scale nor which rows they update nor whether the weights beside them hold
the adapter already. So:

1. An entry has a *form*: a few numbers, equal if its tensors mean the same.
2. `state_dict` notes forms, and what is merged, in its metadata. `torch.save` keeps that. A file of
   ours that is read by others as plain tensors has each form as one more tensor. Of merged weights
   each layer says it by a tensor as well, which stays among the keys whatever they pass through.
3. `load_state_dict` of a module with adapters compares all forms before anything is written.
4. Without forms, as through safetensors, a dict is taken for one of the model's own if the model
   has given one. Else nothing is known of it, and it is refused.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.core.layers.attached import Entry, attached_to, attribute
from lora_inject.core.spec.names import canonical, joined
from lora_inject.errors import StateError

# Keys of the forms of a module's entries, by their marks, and of the names of merged adapters.
FORMS, MERGED = "lora_forms", "lora_merged"
# Name, in its module, of the tensor by which merged weights say so: an attribute of its class.
MERGED_MARK = "_lora_merged"
_ASKED = "load_state_dict"
_SAME = "Inject with the same config as there, or use save_adapter and load_adapter"


class Form(NamedTuple):
    """What the tensors of an entry mean."""

    scale: float
    rank: int  # 0 of a trained copy
    rest: int  # a checksum over slices, experts, variant and rows


def form_of(entry: Entry) -> Form:
    """Return the form of an entry."""
    if entry.spec is None:
        return Form(entry.scale or 0.0, 0, _checksum(entry.rows))
    spec = entry.spec
    return Form(spec.scale, spec.rank, _checksum(spec.form[2:]))  # after rank and scale


def form_key(entry: Entry) -> str:
    """Return the name, in its module, of the tensor with an entry's form."""
    return attribute("form", entry.adapter, None if entry.on_output else entry.param)


def forms_as_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the forms of all entries in a model as tensors, by keys like those of a state dict."""
    return {
        joined(path, form_key(entry)): torch.tensor(form_of(entry), dtype=torch.float64)
        for path, module in model.named_modules(remove_duplicate=False)
        if (attached := attached_to(module)) is not None
        for entry in attached.entries()
    }


def note_forms(module: Any, state_dict: Any, prefix: str) -> None:
    """Note forms, and what is merged, in a module's part of a state dict and of its metadata."""
    attached = module._lora
    merged = list(attached.selection.merged)
    if merged:
        state_dict[prefix + MERGED_MARK] = getattr(module, MERGED_MARK)
    noted = getattr(state_dict, "_metadata", {}).get(prefix[:-1])
    if noted is None:
        return
    noted[FORMS] = {entry.mark: [form_key(entry), *form_of(entry)] for entry in attached.entries()}
    if merged:
        noted[MERGED] = merged
    attached.given = attached.given.union(noted[FORMS])


def check_forms(model: nn.Module, state_dict: Any) -> None:
    """Raise if a state dict may not be loaded into the adapters of a model, and their base.

    1. Neither the weights here nor those of the dict hold a merged adapter.
    2. What the dict has of an entry means there what it means here.
    3. Of an adapter that it tells of, it has the entries that are here, and no others.
    """
    modules = model.named_modules(remove_duplicate=False)
    there = [(path, module) for path, module in modules if attached_to(module) is not None]
    for _, module in there:
        check_weights_unmerged(module)
    if not there or not isinstance(state_dict, Mapping):
        return
    metadata = getattr(state_dict, "_metadata", None) or {}
    for noted in metadata.values():
        check_dict_unmerged(noted)
    check_unmarked(state_dict)
    keys = {canonical(key): key for key in state_dict}
    here: dict[str, set[str]] = {}
    for path, module in there:
        check_same_forms(canonical(path), module, keys, state_dict, metadata.get(path, {}))
        for entry in _entries(module):
            forms = here.setdefault(entry.adapter, set())
            forms.add(joined(canonical(path), form_key(entry)))
    for adapter, forms in here.items():
        _check_same_entries(adapter, forms, keys, metadata)


def _check_same_entries(
    adapter: str, here: set[str], keys: Mapping[str, str], metadata: Mapping[str, Any]
) -> None:
    """Raise if a dict tells of other entries of an adapter than there are, by their forms' keys."""
    for key in {*_noted_in(keys, metadata, adapter)} - here:
        problem = f"adapter {adapter!r} has {key!r} there, and no such site here"
        raise StateError(_ASKED, problem, _SAME)
    carried = here & keys.keys()
    for key in here - carried if carried else ():
        problem = f"adapter {adapter!r} has {key!r} here, and no such site there"
        raise StateError(_ASKED, problem, _SAME)


def check_part(
    module: nn.Module, prefix: str, state_dict: Mapping[str, Any], noted: Mapping[str, Any]
) -> None:
    """Raise if a module may not take its part of a state dict, whoever loads it."""
    check_weights_unmerged(module)
    check_dict_unmerged(noted)
    check_unmarked(key for key in state_dict if key == prefix + MERGED_MARK)
    check_same_forms(prefix[:-1], module, {key: key for key in state_dict}, state_dict, noted)


def _entries(module: nn.Module) -> Iterator[Entry]:
    attached = attached_to(module)
    assert attached is not None
    return attached.entries()


def check_weights_unmerged(module: nn.Module) -> None:
    """Raise if the weights of a module hold a merged adapter."""
    attached = attached_to(module)
    if attached is not None and attached.selection.merged:
        raise StateError(
            _ASKED,
            "the weights hold a merged adapter, and unmerge would write over what is loaded",
            "Call unmerge(model) first, or eject(model) where the merge kept nothing (undo=False)",
        )


def check_dict_unmerged(noted: Mapping[str, Any]) -> None:
    """Raise if the base's weights in a state dict hold an adapter, which would count twice here."""
    for name in noted.get(MERGED, ()):
        raise _merged(f"{name!r} was")


def check_unmarked(keys: Iterable[str]) -> None:
    """Raise if one of the keys is the mark of merged weights."""
    for key in keys:
        if key.rpartition(".")[2] == MERGED_MARK:
            raise _merged("adapters were")


def _merged(who: str) -> StateError:
    problem = f"it was taken while {who} merged into the weights, and here an adapter adds to them"
    remedy = "Take it after unmerge(model), or load it into the model without adapters"
    return StateError(_ASKED, problem, remedy)


def check_same_forms(
    path: str,
    module: nn.Module,
    keys: Mapping[str, str],
    state_dict: Mapping[str, Any],
    noted: Mapping[str, Any],
) -> None:
    """Raise if what a state dict holds for a module's entries means something else here.

    `keys` are those of the dict by their canonical names; `noted` is the module's metadata.
    """
    forms, attached = noted.get(FORMS, {}), attached_to(module)
    assert attached is not None
    for entry in attached.entries():
        names = {joined(path, flat): tensor for flat, tensor in _flat(entry, module)}
        foreign = (n for n, own in names.items() if n in keys and not _is(own, state_dict[keys[n]]))
        held = next(foreign, None)
        _, *form = forms.get(entry.mark, [""])
        if (carried := joined(path, form_key(entry))) in keys:
            form = _numbers(state_dict[keys[carried]])
        if held is None or (not form and entry.mark in attached.given):
            continue
        if not form:
            raise StateError(
                f"{_ASKED}, {held!r}",
                "the dict does not say for which scale and slices its tensors were trained: its "
                "metadata is gone, as through safetensors",
                "Keep the OrderedDict that state_dict() gives, as torch.save does, or use "
                "save_adapter and load_adapter",
            )
        for what, theirs, ours in _differences(Form(*form), form_of(entry)):
            problem = f"its adapter has {what} {theirs} in the state dict, and {ours} here"
            raise StateError(f"{_ASKED}, {held!r}", problem, _SAME)


def _flat(entry: Entry, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name in the module and the tensor of each role of an entry."""
    for role, tensor in entry.tensors(module).items():
        yield entry.names[role], tensor


def is_own(module: nn.Module, flat: str, tensor: Any) -> bool:
    """Return whether a tensor of a state dict is the module's own, which gives it no values.

    torch's `set_model_state_dict` fills a dict with what the model has.
    """
    return _is(module._parameters[flat], tensor)


def _is(own: Any, tensor: Any) -> bool:
    mine, given = (getattr(t, "_local_tensor", t) for t in (own, tensor))
    if mine is given:
        return True
    plain = isinstance(mine, Tensor) and isinstance(given, Tensor)
    if not plain or mine.is_meta or given.is_meta or not mine.numel():
        return False
    return bool(mine.data_ptr() == given.data_ptr() and mine.shape == given.shape)


def _differences(theirs: Form, ours: Form) -> Iterator[tuple[str, str, str]]:
    """Yield what differs between two forms, and how it is there and here."""
    if theirs.rank != ours.rank:
        yield "rank", f"{theirs.rank:g}", f"{ours.rank:g}"
    if not math.isclose(theirs.scale, ours.scale):
        yield "scale", f"{theirs.scale:g}", f"{ours.scale:g}"
    if theirs.rest != ours.rest:
        yield "slices, rows or a variant", "of its own", "others"


def _numbers(tensor: Tensor) -> list[float]:
    numbers: list[float] = tensor.tolist()
    return numbers


def _noted_in(keys: Mapping[str, str], metadata: Mapping[str, Any], adapter: str) -> Iterator[str]:
    """Yield the canonical keys of the forms of an adapter that a state dict tells."""
    of_adapter = attribute("form", adapter)
    yield from (key for key in keys if key.endswith(of_adapter))
    for path, noted in metadata.items():
        for mark, (form, *_) in noted.get(FORMS, {}).items():
            if joined(canonical(path), mark) in keys and form.endswith(of_adapter):
                yield joined(canonical(path), form)


def _checksum(value: Any) -> int:
    return zlib.crc32(repr(value).encode())
