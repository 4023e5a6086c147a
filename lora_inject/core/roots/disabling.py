"""Other adapters, or none, for the thread or asyncio task that enters a context.

No layer and no parameter is touched, as with `activate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from typing import Any, Self

from torch import nn

from lora_inject.core.layers.contexts import held_by_coroutine, in_context
from lora_inject.core.layers.selected import Mix, Selected
from lora_inject.core.roots.carried import check_unmerged, reach
from lora_inject.errors import StateError


class Reusable(ContextDecorator):
    """A context that can be entered again after it was left, and that decorates functions.

    Args:
        asked: The call that made it.
        make: Makes the context of one `with`.
    """

    def __init__(self, asked: str, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._asked, self._make = asked, make
        self._open: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        """Enter.

        Raises:
            StateError: It was entered and not left, or the selection is refused.
        """
        if self._open is not None:
            problem = "this object was entered before and not left"
            raise StateError(self._asked, problem, f"Call {self._asked} again for each with")
        made = self._make()
        made.__enter__()
        self._open = made

    def __exit__(self, *raised: Any) -> bool | None:
        """Leave."""
        opened, self._open = self._open, None
        return None if opened is None else opened.__exit__(*raised)

    def _recreate_cm(self) -> Self:
        """Return a context of its own for each call of a decorated function."""
        return type(self)(self._asked, self._make)


def disabled(model: nn.Module) -> Reusable:
    """Return a context in which the plain base model runs: no adapter takes part.

    As with `routed`, other threads and tasks are not affected.

    Args:
        model: The root, or any module that holds roots.

    Raises:
        StateError: The model is merged, and so there is no plain base; or a generator enters it.

    Examples:
        >>> import torch
        >>> from lora_inject.core.model.inject import inject
        >>> net = inject(nn.Sequential(nn.Linear(4, 4)), {"rank": 1, "targets": ["0"]})
        >>> with disabled(net):
        ...     y = net(torch.ones(2, 4))
    """
    return Reusable("disabled()", lambda: _without_adapters(model))


def _without_adapters(model: nn.Module) -> AbstractContextManager[None]:
    """Return the context of one `with`."""
    waits = held_by_coroutine("disabled()")
    return selecting(model, Mix(), "disabled", waits=waits)


@contextmanager
def selecting(
    model: nn.Module, selected: Selected, asked: str, *, waits: bool = False
) -> Iterator[None]:
    """Run the body with others taking part, for the calling thread or task only.

    `waits` says that a coroutine holds the context.
    """
    selections = reach(model).selections
    if not selections:
        raise StateError(asked, "the model has no adapter", "Inject or load one first")
    check_unmerged(asked, *selections)
    with in_context(dict.fromkeys(selections, selected), waits=waits):
        yield
