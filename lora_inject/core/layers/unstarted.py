"""The words of a forward, a merge or a read that would use what memory without values holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_inject.errors import LayerError


def refuse_unstarted(attached: Any, entries: Iterable[Any], asked: str) -> None:
    """Raise if entries have memory that nobody has written to."""
    for entry in entries:
        if entry.mark in attached.garbage:
            site = entry.param if entry.spec is None else entry.spec.name
            raise LayerError(
                f"{asked} with adapter {entry.adapter!r} at {site!r}",
                "its tensors were made on the meta device or emptied by to_empty(), and "
                "nothing has started or loaded them since",
                "Load the base with load_state_dict, which starts them, call "
                "reset_parameters() of the layer, or write an adapter's values with "
                "swap_adapter",
            )
