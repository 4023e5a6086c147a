"""The output heads that models state by get_output_embeddings()."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lora_inject.core.layers.survey import Survey


def stated_heads(survey: Survey, stated: Iterable[Any]) -> tuple[str, ...]:
    """Return the names of the output heads; `stated` are the methods that return them."""
    heads = (head for get in stated if (head := _head(get)) is not None)
    return tuple(dict.fromkeys(survey.paths[id(h)] for h in heads if id(h) in survey.paths))


def _head(get: Any) -> nn.Module | None:
    """Return the output head that a method of a model states."""
    try:
        head = get() if callable(get) else None
    except (AttributeError, NotImplementedError):  # a model that has none
        return None
    return head if isinstance(head, nn.Module) else None
