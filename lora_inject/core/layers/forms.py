"""Which state dict may be loaded into a module with adapters.

`load_state_dict` compares before anything is written:

1. Neither the weights here nor those of the dict hold a merged adapter.
2. What the dict has of an entry means there what it means here (`layers.told`). Tensors of which it
   does not say that are refused, unless they are the module's own.
3. Of an adapter that it has, it tells of the entries that are here, and of no others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from lora_inject.core.layers.attached import Attached, Entry, attached_to
from lora_inject.core.layers.told import (
    ASKED,
    FORMS,
    NOTHING,
    Form,
    Told,
    form_of,
    told_by,
    told_of,
    told_of_all,
)
from lora_inject.core.spec.names import canonical, joined
from lora_inject.errors import StateError

_SAME = "Inject with the same config as there, or use save_adapter and load_adapter"


def check_forms(model: nn.Module, state_dict: Any) -> None:
    """Raise if a state dict may not be loaded into the adapters of a model, and their base."""
    modules = {
        canonical(path): module for path, module in model.named_modules(remove_duplicate=False)
    }
    there = {path: module for path, module in modules.items() if attached_to(module) is not None}
    for module in there.values():
        check_weights_unmerged(module)
    if there and isinstance(state_dict, Mapping):
        told = told_of_all(state_dict)
        for of_module in told.values():
            _check_unmerged(of_module)
        # If it has names that are none here, a hook may know which they are.
        _check_modules(there, state_dict, told, all_named=told.keys() <= modules.keys())


def _check_modules(
    there: Mapping[str, nn.Module],
    state_dict: Mapping[str, Any],
    told: Mapping[str, Told],
    *,
    all_named: bool,
) -> None:
    """Raise if a state dict may not be loaded into modules with adapters, given by their names."""
    tensors = {canonical(key): tensor for key, tensor in state_dict.items()}
    here: dict[str, set[str]] = {}
    for path, module in there.items():
        _check_same_forms(path, module, tensors, told.get(path, NOTHING))
        for entry in _attached(module).entries():
            here.setdefault(entry.adapter, set()).add(joined(path, entry.mark))
    for adapter, marks in here.items() if all_named else ():
        _check_same_entries(adapter, marks, told, tensors)


def check_part(
    module: nn.Module, prefix: str, state_dict: Mapping[str, Any], noted: Mapping[str, Any]
) -> None:
    """Raise if a module may not take its part of a state dict, whoever loads it."""
    check_weights_unmerged(module)
    path = prefix[:-1]
    told = told_of(path, state_dict, noted)
    _check_unmerged(told)
    _check_same_forms(path, module, state_dict, told)


def check_put(module: nn.Module, value: Tensor) -> None:
    """Raise if tensors that stand in for a module's own during a call mean something else there."""
    asked, told = "functional_call", told_by(FORMS, value)
    here = _attached(module)
    there = ", ".join(told.merged) or "no adapter"
    if told.merged.keys() != here.selection.merged.keys():
        raise StateError(
            asked,
            f"the weights of the state dict hold {there}, merged into them, and those here "
            f"{', '.join(here.selection.merged) or 'no adapter'}",
            "Take it from the model as it is now",
        )
    for entry in here.entries():
        if (theirs := told.forms.get(entry.adapter, {}).get(entry.mark)) is not None:
            _check_same_form(f"{asked}, {entry.mark!r}", theirs, entry)


def _attached(module: nn.Module) -> Attached:
    attached = attached_to(module)
    assert attached is not None
    return attached


def check_weights_unmerged(module: nn.Module) -> None:
    """Raise if the weights of a module hold a merged adapter."""
    attached = attached_to(module)
    if attached is not None and attached.selection.merged:
        raise StateError(
            ASKED,
            "the weights hold a merged adapter, and unmerge would write over what is loaded",
            "Call unmerge(model) first, or eject(model) where the merge kept nothing (undo=False)",
        )


def _check_unmerged(told: Told) -> None:
    """Raise if the weights of a state dict hold an adapter, which would count twice here."""
    for name in told.merged:
        raise StateError(
            ASKED,
            f"it was taken while {name!r} was merged into the weights, and here an adapter adds "
            "to them",
            "Take it after unmerge(model), or load it into the model without adapters",
        )


def _check_same_forms(path: str, module: nn.Module, tensors: Mapping[str, Any], told: Told) -> None:
    """Raise if what a state dict holds for a module's entries means something else here."""
    for entry in _attached(module).entries():
        theirs = told.forms.get(entry.adapter, {}).get(entry.mark)
        for name, own in _named(path, entry, module):
            if name not in tensors:
                continue
            if theirs is not None:
                _check_same_form(f"{ASKED}, {name!r}", theirs, entry)
            elif not _is(own, tensors[name]):
                _refuse_untold(name, joined(path, FORMS))


def _refuse_untold(name: str, key: str) -> NoReturn:
    """Raise for a tensor of a state dict that does not say what it means."""
    raise StateError(
        f"{ASKED}, {name!r}",
        "the dict does not say for which scale and slices its tensors were trained: that stands "
        f"under {key!r} in what state_dict() gives",
        "Load that key as well, or use save_adapter and load_adapter",
    )


def _check_same_form(asked: str, theirs: Form, entry: Entry) -> None:
    """Raise if tensors of a state dict, of this form, mean something else here."""
    for what, there, here in _differences(theirs, form_of(entry)):
        problem = f"its adapter has {what} {there} in the state dict, and {here} here"
        raise StateError(asked, problem, _SAME)


def _check_same_entries(
    adapter: str, here: set[str], told: Mapping[str, Told], tensors: Mapping[str, Any]
) -> None:
    """Raise if a dict has other entries of an adapter than there are."""
    forms = ((path, of_module.forms.get(adapter, {})) for path, of_module in told.items())
    there = {joined(path, mark) for path, marks in forms for mark in marks}
    if there.isdisjoint(tensors):
        return
    for name in sorted(there - here):
        problem = f"adapter {adapter!r} has {name!r} there, and no such site here"
        raise StateError(ASKED, problem, _SAME)
    for name in sorted(here - there):
        problem = f"adapter {adapter!r} has {name!r} here, and no such site there"
        raise StateError(ASKED, problem, _SAME)


def _named(path: str, entry: Entry, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the key and the tensor of each role of an entry."""
    for role, tensor in entry.tensors(module).items():
        yield joined(path, entry.names[role]), tensor


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
