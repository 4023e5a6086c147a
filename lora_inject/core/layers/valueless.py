"""Entries without values: what was made on the meta device, or emptied.

An entry that is put on a module on the meta device has no values. Neither has one that `to_empty`
gave new memory. `layers.starting` says where it gets them. Until then a forward that would use what
the memory holds is refused (`Attached.check_started`).
"""

from __future__ import annotations

import types
from collections.abc import Iterable

from torch import nn

from lora_inject.core.layers.attached import Attached, Entry, attached_to

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
