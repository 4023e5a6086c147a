"""Choosing among adapters: which take part, and for how much.

`activate` is a setting of the model, for all threads. `disabled` holds for the thread or asyncio
task that entered it. Neither of them touches a layer, a parameter or
`requires_grad`, so each costs the same for ten sites as for ten thousand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from typing import Any, Self, TypeVar

from torch import nn

from lora_inject.core.layers.contexts import held_by_coroutine, in_context
from lora_inject.core.layers.selected import Mix, Selected
from lora_inject.core.model.carried import check_names, reach, refuse_merged, refuse_mixes
from lora_inject.errors import StateError, check_type

M = TypeVar("M", bound=nn.Module)


def activate(model: M, which: str | Mapping[str, float] | None) -> M:
    """Choose the adapters that take part from here on, in all threads.

    On CUDA this is an operation of the current stream: compiled forwards in another stream have to
    wait for it.

    Args:
        model: The root, or any module that holds roots.
        which: One adapter; a mix of several with their weights (`W + sum of w * scale * B @ A`);
            or None, like an empty mix, for the plain base.

    Returns:
        The same object.

    Raises:
        StateError: A name is unknown, a weight is not finite, or the model is merged.
        LayerError: An adapter with a gain (DoRA) is not the only one at one of its sites.

    Examples:
        >>> from lora_inject.core.model.inject import inject
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("sql", "style"):
        ...     _ = inject(net, {"rank": 1, "targets": ["0"]}, name)
        >>> _ = activate(net, {"sql": 0.7, "style": 0.3})
    """
    weights = weights_of(which, "activate")
    reached = reach(model)
    if not reached.selections:
        raise StateError("activate", "the model has no adapter", "Inject or load one first")
    check_names(reached.names, weights, "activate")
    refuse_merged("activate", *reached.selections)
    refuse_mixes(model, reached, weights)
    for selection in reached.selections:
        selection.check_settled("activate")
    mix = Mix(weights)
    for selection in reached.selections:
        selection.replace(mix)
    return model


def weights_of(which: str | Mapping[str, float] | None, verb: str) -> dict[str, float]:
    """Return the weights of a name, of a mix, or of nothing."""
    if which is None or isinstance(which, str):
        return {} if which is None else {which: 1.0}
    check_type(verb, which, Mapping, "Give a name, a mapping of names to weights, or None")
    for name, weight in which.items():
        asked = f"{verb} {name!r}"
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise StateError(asked, f"its weight is {weight!r}", "Give a finite number")
    return {name: float(weight) for name, weight in which.items()}


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
    refuse_merged(asked, *selections)
    with in_context(dict.fromkeys(selections, selected), waits=waits):
        yield
