"""What a state dict tells of adapters besides their tensors: one key more of each module.

Tensors tell neither a scale nor which rows they update nor whether the weights beside them hold
the adapter already. So a module with adapters has a text in a state dict: of each entry its *form*,
a few numbers that are equal if its tensors mean the same, and what is merged. The tensor of the key
holds one float for each byte of it. Such floats are exact down to bfloat16, so casts, clones,
averages of equal dicts and files of plain tensors keep the text, and a checksum says if something
did not. The metadata of the dict has it, too, for those who take the keys of adapters out.
"""

from __future__ import annotations

import functools
import json
import zlib
from array import array
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.core.layers.attached import Entry, attached_to
from lora_inject.core.spec.names import canonical, leaf, parent
from lora_inject.core.spec.sites import meaning
from lora_inject.errors import StateError

FORMS = "_lora_forms"
"""The key in its module, in the module's metadata, and an attribute of every swapped class."""

ASKED = "load_state_dict"


class Form(NamedTuple):
    """What the tensors of an entry mean."""

    scale: float
    rank: int  # 0 of a trained copy
    rest: int  # a checksum over slices, experts, variant and rows


class Told(NamedTuple):
    """What a state dict tells of one module."""

    forms: Mapping[str, Mapping[str, Form]]  # by adapter and by the mark of its entry
    merged: Mapping[str, float]  # weights in the mix by adapter


NOTHING = Told({}, {})


def form_of(entry: Entry) -> Form:
    """Return the form of an entry."""
    if entry.spec is None:
        return Form(entry.scale or 0.0, 0, _checksum(entry.rows))
    spec = entry.spec
    return Form(spec.scale, spec.rank, _checksum(meaning(spec)))


@functools.lru_cache(maxsize=1024)
def _checksum(value: Any) -> int:
    return zlib.crc32(repr(value).encode())


def tell(module: nn.Module, state_dict: Any, prefix: str) -> None:
    """Put the text about a module with adapters into its part of a state dict, and of its metadata.

    The tensor is float32 of shape (bytes,), on the CPU, and shares no memory.
    """
    attached = attached_to(module)
    assert attached is not None
    forms = tuple((entry.adapter, entry.mark, form_of(entry)) for entry in attached.entries())
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
    told = Told(by_adapter, dict(merged))
    text = json.dumps(told, separators=(",", ":"), sort_keys=True)
    text += f"#{zlib.crc32(text.encode()):08x}"
    return text, array("f", list(text.encode())).tobytes()


def told_of_all(state_dict: Mapping[str, Any]) -> dict[str, Told]:
    """Return what a state dict tells, by the canonical names of the modules."""
    metadata = getattr(state_dict, "_metadata", None) or {}
    keyed = {parent(key) for key in state_dict if leaf(key) == FORMS}
    # Metadata keep the names of modules whose keys were renamed in place.
    noted = {parent(key) for key in state_dict} & metadata.keys()
    return {
        canonical(path): told_of(path, state_dict, metadata.get(path, {})) for path in keyed | noted
    }


def told_of(path: str, state_dict: Mapping[str, Any], noted: Mapping[str, Any]) -> Told:
    """Return what a state dict tells of the module at `path`, whose metadata are `noted`.

    Raises:
        StateError: The values are not those that `state_dict()` gave.
    """
    key = f"{path}.{FORMS}" if path else FORMS
    if key in state_dict:
        return told_by(key, state_dict[key])
    return _read(noted[FORMS].encode()) if FORMS in noted else NOTHING


def told_by(key: str, tensor: Tensor) -> Told:
    """Return what the tensor of a key tells.

    Raises:
        StateError: Its values are not those that `state_dict()` gave.
    """
    try:
        return _read(bytes(round(number) for number in tensor.tolist()))
    except (AttributeError, ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise StateError(
            f"{ASKED}, {key!r}",
            f"what it says of adapters is no longer that which state_dict() gave ({error})",
            "Leave its values as they are, in bfloat16 or wider, or use save_adapter and "
            "load_adapter",
        ) from error


@functools.lru_cache(maxsize=1024)
def _read(text: bytes) -> Told:
    """Return what a text tells.

    Raises:
        ValueError: It is none, or part of one.
    """
    told, _, checksum = text.rpartition(b"#")
    if checksum != b"%08x" % zlib.crc32(told):
        raise ValueError("its checksum is another")
    forms, merged = json.loads(told)
    by_adapter = {
        adapter: {mark: Form(*form) for mark, form in marks.items()}
        for adapter, marks in forms.items()
    }
    return Told(by_adapter, dict(merged))
