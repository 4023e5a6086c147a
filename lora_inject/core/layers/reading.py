"""Who reads an adapted parameter, and what it reads as.

The rule: the attribute of an adapted parameter reads as W + delta, for whoever reads it. Raw are
`parameters()`, `state_dict()` and `_parameters`. A layer's own forward, to whose output the update
is added, reads its own W (`own_code`). What the sum is stands in `effective`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch
from torch import nn

from lora_inject.core.functional.factors import needs_plain_operations
from lora_inject.core.layers.adapted import Adapted
from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.own_code import OWN
from lora_inject.core.spec.rooms import room, standing_at
from lora_inject.errors import LayerError


class Reading(Adapted):
    """The part of a swapped class that gives whoever reads a parameter W + delta."""

    def _lora_read(self, param: str, raw: Any) -> Any:
        """Return what the attribute of a parameter reads as.

        1. Code that keeps or writes the parameters finds them.
        2. The forward to whose output updates are added finds W, with what is read alone.
        3. A library that moves or rounds a parameter finds it.
        4. Whoever else reads gets W + delta, which cannot be written to.
        """
        attached = self._lora
        if OWN.keeps is attached:
            return raw
        adds = OWN.adds is attached
        entries = self._lora_entries(param, with_forward=not adds)
        if not entries:
            return raw
        outside = not adds and not attached.runs_here()
        if outside and not torch.compiler.is_compiling():
            if any(standing_at(path)(self, param, raw) for path in room("libraries").movers()):
                return raw
            if type(raw) is nn.Parameter:
                attached.last_read[param] = ref(raw)
        value = self._lora_value(param, raw, entries, outside=outside)
        if value is raw or needs_plain_operations():
            return value
        from lora_inject.core.functional.read_only import read_only

        return read_only(value)

    def _lora_entries(self, param: str, *, with_forward: bool) -> Mapping[str, Entry]:
        """Return the entries on a parameter, those on the output of the layer as well or not."""
        reads = self._lora.reads.get(param, {})
        if not (with_forward and self._lora.forward and param == self.weight_name):
            return reads
        return {**self._lora.forward, **reads}

    def _lora_read_mixed(
        self, param: str, raw: Any, taking: list[tuple[Entry, float]], *, outside: bool
    ) -> Any:
        """Return W + delta, of the entries of a mix that are on a parameter."""
        from lora_inject.core.layers.effective import read_mixed

        return read_mixed(self, param, raw, taking, outside=outside)


def weight_property(param: str) -> property:
    """Return the property of a swapped class that replaces a parameter."""

    def read(self: Reading) -> Any:
        raw = self._lora_raw(param)
        try:
            return self._lora_read(param, raw)
        except AttributeError as error:
            # nn.Module would answer an AttributeError with the raw weight: an inert adapter.
            raise LayerError(
                f"reading {param!r} of {type(self).__name__}",
                f"its effective value could not be formed ({error})",
                "This is a defect of the adapter's arithmetic; please report it",
            ) from error

    def write(self: Reading, value: Any) -> None:
        # Parameters do not come here: nn.Module.__setattr__ puts them into `_parameters`.
        self._lora_check_replaced(param)
        self.__dict__[param] = value

    def delete(self: Reading) -> None:
        del self.__dict__[param]

    return property(read, write, delete)


READER = weight_property("").fget.__code__  # type: ignore[union-attr]
"""The code by whose caller it is known who reads a parameter (`inside.caller_of`)."""
