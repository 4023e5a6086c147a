"""The output heads that models state by get_output_embeddings()."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from lora_inject.core.layers.candidates import STATES_HEAD
from lora_inject.core.layers.survey import Survey


def stated_heads(survey: Survey, stating: Collection[type]) -> tuple[str, ...]:
    """Return the names of the output heads that models and parts of them state.

    `stating` are the classes that have the method.
    """
    heads = (head for head in _heads(survey, stating) if id(head) in survey.paths)
    return tuple(dict.fromkeys(survey.paths[id(head)] for head in heads))


def _heads(survey: Survey, stating: Collection[type]) -> Iterator[nn.Module]:
    """Yield the output heads."""
    for _, module in survey.modules:
        if type(module) in stating or STATES_HEAD in module.__dict__:
            head = _output_head(module)
            if head is not None:
                yield head


def _output_head(module: nn.Module) -> nn.Module | None:
    """Return the output head that a model states by get_output_embeddings()."""
    get = getattr(module, STATES_HEAD)
    try:
        head = get() if callable(get) else None
    except (AttributeError, NotImplementedError):  # a model that has none
        return None
    return head if isinstance(head, nn.Module) else None
