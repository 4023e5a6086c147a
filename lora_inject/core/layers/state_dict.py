"""What a state dict tells of adapters besides tensors, and how a module takes its part of one.

Tensors tell neither a scale nor which rows they update nor whether the weights beside them hold
the adapter already. So a module with adapters has one key more in a state dict, a text: of each
entry its *form*, a few numbers that are equal if its tensors mean the same, and what is merged. The
tensor of the key holds one float for each byte of it. Such floats are exact down to bfloat16, so
casts, clones, averages of equal dicts and files of plain tensors keep the text, and a checksum says
if something did not. The metadata of the dict has it, too, for those who take the keys of adapters
out.

A module compares before it takes its part. As torch's own errors, a refusal leaves the modules
before it written.
"""

from __future__ import annotations

import functools
import json
import math
import zlib
from array import array
from collections.abc import Hashable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.core.layers.attached import Attached, Entry
from lora_inject.core.layers.reading import keeping
from lora_inject.core.layers.starting import is_own, names_given, start_loaded, waiting
from lora_inject.core.spec.sites import meaning
from lora_inject.errors import StateError

FORMS = "_lora_forms"
"""The key in its module, in the module's metadata, and an attribute of every swapped class."""

_ASKED = "load_state_dict"


class Form(NamedTuple):
    """What the tensors of an entry mean."""

    scale: float
    rank: int  # 0 of a trained copy
    rest: int  # a checksum over slices, experts, variant and rows

    @classmethod
    def of(cls, entry: Entry) -> Form:
        """Return the form of an entry."""
        if entry.spec is None:
            return cls(entry.scale or 0.0, 0, _checksum(entry.rows))
        return cls(entry.spec.scale, entry.spec.rank, _checksum(meaning(entry.spec)))

    def differences(self, here: Form) -> Iterator[str]:
        """Yield what a form in a state dict has otherwise than the one here."""
        if self.rank != here.rank:
            yield f"rank {self.rank} in the state dict, and {here.rank} here"
        if not math.isclose(self.scale, here.scale):
            yield f"scale {self.scale:g} in the state dict, and {here.scale:g} here"
        if self.rest != here.rest:
            yield "slices, rows or a variant of its own in the state dict, and others here"


@functools.lru_cache(maxsize=1024)
def _checksum(value: Hashable) -> int:
    return zlib.crc32(repr(value).encode())


class Told(NamedTuple):
    """What a state dict tells of one module."""

    forms: Mapping[str, Mapping[str, Form]]  # by adapter and by the mark of its entry
    merged: Mapping[str, float]  # weights in the mix by adapter


# ---------------------------------------------------------------------------------- what it says


def tell(attached: Attached, state_dict: MutableMapping[str, Any], prefix: str) -> None:
    """Put the text about a module into its part of a state dict, and of its metadata.

    The tensor is float32 of shape (bytes,), on the CPU, and shares no memory.
    """
    forms = tuple((entry.adapter, entry.mark, Form.of(entry)) for entry in attached.entries())
    text, floats = _written(forms, tuple(attached.selection.merged.items()))
    # No operation of torch, which a mode for fake tensors would take.
    state_dict[prefix + FORMS] = torch.frombuffer(bytearray(floats), dtype=torch.float32)
    noted = getattr(state_dict, "_metadata", {}).get(prefix[:-1])
    if noted is not None:
        noted[FORMS] = text


@functools.lru_cache(maxsize=1024)  # most sites of a model have the same text
def _written(
    forms: tuple[tuple[str, str, Form], ...], merged: tuple[tuple[str, float], ...]
) -> tuple[str, bytes]:
    """Return a text, and its bytes as floats."""
    by_adapter: dict[str, dict[str, Form]] = {}
    for adapter, mark, form in forms:
        by_adapter.setdefault(adapter, {})[mark] = form
    text = json.dumps(Told(by_adapter, dict(merged)), separators=(",", ":"), sort_keys=True)
    text += f"#{zlib.crc32(text.encode()):08x}"
    return text, array("f", list(text.encode())).tobytes()


def _told_of(key: str, state_dict: Mapping[str, Any], noted: Mapping[str, Any]) -> Told:
    """Return what a state dict tells under a key, or in the metadata of the module."""
    if key not in state_dict:
        return _read(noted[FORMS].encode()) if FORMS in noted else Told({}, {})
    try:
        return _read(bytes(round(number) for number in state_dict[key].tolist()))
    except (AttributeError, ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise StateError(
            f"{_ASKED}, {key!r}",
            f"what it says of adapters is no longer that which state_dict() gave ({error})",
            "Leave its values as they are, in bfloat16 or wider, or use save_adapter and "
            "load_adapter",
        ) from error


@functools.lru_cache(maxsize=1024)
def _read(text: bytes) -> Told:
    told, _, checksum = text.rpartition(b"#")
    if checksum != b"%08x" % zlib.crc32(told):
        raise ValueError("its checksum is another")
    forms, merged = json.loads(told)
    by_adapter = {
        adapter: {mark: Form(*form) for mark, form in marks.items()}
        for adapter, marks in forms.items()
    }
    return Told(by_adapter, dict(merged))


# ------------------------------------------------------------------------------------ taking part


@contextmanager
def taking(
    module: nn.Module,
    attached: Attached,
    state_dict: Mapping[str, Any],
    prefix: str,
    noted: Mapping[str, Any],
    missing_keys: list[str],
    unexpected_keys: list[str],
) -> Iterator[None]:
    """Check a module's part of a state dict, let it be loaded inside, and say what was missing.

    Of an adapter a dict may lack all keys, as a plain base checkpoint does, or none.
    """
    _check_part(module, attached, state_dict, prefix, noted)
    unstarted = waiting(module, attached)
    given = names_given(module, state_dict, prefix) if unstarted else set()
    with keeping(attached, replaces=True):
        yield
    started = {entry.mark for entry in unstarted if start_loaded(module, entry, given)}
    if attached.garbage:
        attached.garbage -= started
    unexpected_keys[:] = [key for key in unexpected_keys if key != prefix + FORMS]
    loading: Loading | None = attached.selection.loading
    if loading is None or loading.missing_keys is not missing_keys:
        loading = attached.selection.loading = Loading(missing_keys)
    for entry in attached.entries():
        keys = [prefix + flat for flat in entry.names.values()]
        loading.note(entry.adapter, keys, any_there=any(key in state_dict for key in keys))


class Loading:
    """One call of `load_state_dict`, known by the list of missing keys that it collects.

    An adapter is missing as a whole or not at all, also where `strict` is false: Trainer resumed a
    run under other targets so, with half an adapter and the moments of another.
    """

    def __init__(self, missing_keys: list[str]) -> None:
        self.missing_keys = missing_keys
        self._forgiven: dict[str, list[str]] = {}
        self._present: set[str] = set()

    def note(self, adapter: str, keys: list[str], *, any_there: bool) -> None:
        """Note the keys of an entry of an adapter, and whether any of them is there."""
        if any_there:
            self._present.add(adapter)
        else:
            self._forgiven.setdefault(adapter, []).extend(keys)
            self.missing_keys[:] = [key for key in self.missing_keys if key not in keys]
        if adapter in self._present and (lacking := self._forgiven.pop(adapter, None)):
            raise StateError(
                f"{_ASKED}, {lacking[0]!r}",
                f"the dict has other tensors of adapter {adapter!r}, and not this one",
                "Inject with the same config as there, or use save_adapter and load_adapter",
            )


def _check_part(
    module: nn.Module,
    attached: Attached,
    state_dict: Mapping[str, Any],
    prefix: str,
    noted: Mapping[str, Any],
) -> None:
    """Raise if a module may not take its part of a state dict.

    Neither the weights here nor those of the dict may hold a merged adapter. What the dict has of
    an entry means there what it means here; tensors of which it does not say that are refused,
    unless they are the module's own.
    """
    if attached.selection.merged:
        raise StateError(
            _ASKED,
            "the weights hold a merged adapter, and unmerge would write over what is loaded",
            "Call unmerge(model) first, or eject(model) where the merge kept nothing (undo=False)",
        )
    told = _told_of(prefix + FORMS, state_dict, noted)
    for name in told.merged:
        raise StateError(
            _ASKED,
            f"it was taken while {name!r} was merged into the weights, and here an adapter adds "
            "to them",
            "Take it after unmerge(model), or load it into the model without adapters",
        )
    for entry in attached.entries():
        theirs = told.forms.get(entry.adapter, {}).get(entry.mark)
        for flat in entry.names.values():
            key = prefix + flat
            if key not in state_dict:
                continue
            if theirs is not None or not is_own(module, flat, state_dict[key]):
                _check_same(key, prefix, theirs, Form.of(entry))


def check_put(attached: Attached, value: Tensor) -> None:
    """Raise if the dict of a `functional_call` means something else than the module here.

    Its values would have the scale that is here; merged ones would be W + 2 delta.
    """
    told = _told_of(FORMS, {FORMS: value}, {})
    problems = [
        f"its adapter {entry.adapter!r} has {difference}"
        for entry in attached.entries()
        if (theirs := told.forms.get(entry.adapter, {}).get(entry.mark)) is not None
        for difference in theirs.differences(Form.of(entry))
    ]
    if told.merged.keys() != attached.selection.merged.keys():
        there, here = (", ".join(m) or "none" for m in (told.merged, attached.selection.merged))
        problems.append(f"it holds merged adapters ({there}), and the model others ({here})")
    if problems:
        remedy = "Give the state dict of the model as it is now, or its parameters alone"
        raise StateError("functional_call with a state dict", problems[0], remedy)


def _check_same(key: str, prefix: str, theirs: Form | None, here: Form) -> None:
    """Raise if a tensor of a state dict means something else here, or does not say what."""
    if theirs is None:
        raise StateError(
            f"{_ASKED}, {key!r}",
            "the dict does not say for which scale and slices its tensors were trained: that "
            f"stands under {prefix + FORMS!r} in what state_dict() gives",
            "Load that key as well, or use save_adapter and load_adapter",
        )
    for difference in theirs.differences(here):
        raise StateError(
            f"{_ASKED}, {key!r}",
            f"its adapter has {difference}",
            "Inject with the same config as there, or use save_adapter and load_adapter",
        )
