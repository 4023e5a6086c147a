"""Choosing among adapters: which take part, for how much, for which rows.

`activate` is a setting of the model, for all threads. `disabled` and `routed` hold for the thread,
asyncio task or generator that entered them. None of them touches a layer, a parameter or
`requires_grad`, so each costs the same for ten sites as for ten thousand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from typing import Any, Self, TypeVar

from torch import nn

from lora_inject.core.layers.contexts import within
from lora_inject.core.layers.selection import BASE, State
from lora_inject.core.model.carried import check_names, reach, refuse_merged, refuse_mixes
from lora_inject.errors import StateError, article, check_type

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
    found = reach(model)
    if not found.selections:
        raise StateError("activate", "the model has no adapter", "Inject or load one first")
    check_names(found.names, weights, "activate")
    refuse_merged("activate", *found.selections)
    refuse_mixes(model, found, weights)
    for selection in found.selections:
        selection.check_settled("activate")
    state = State(active=tuple(weights.items()))
    for selection in found.selections:
        selection.replace(state)
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
            found = "this object was entered before and not left"
            raise StateError(self._asked, found, f"Call {self._asked} again for each with")
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

    As with `routed`, other threads, tasks and generators are not affected.

    Args:
        model: The root, or any module that holds roots.

    Raises:
        StateError: The model is merged, and so there is no plain base.

    Examples:
        >>> import torch
        >>> from lora_inject.core.model.inject import inject
        >>> net = inject(nn.Sequential(nn.Linear(4, 4)), {"rank": 1, "targets": ["0"]})
        >>> with disabled(net):
        ...     y = net(torch.ones(2, 4))
    """
    return Reusable("disabled()", lambda: within_state(model, BASE, "disabled"))


def routed(model: nn.Module, adapters: Iterable[str | None], *, repeat: int = 1) -> Reusable:
    """Return a context with one adapter for each row of the batch, in training as well.

    The context belongs to the thread, asyncio task or generator that enters it. A task, or a thread
    of `asyncio.to_thread`, that is started inside sees it; a plain `threading.Thread` or a thread
    of an executor does not, and runs under the model's own setting. In a generator it holds while
    the generator runs. A compiled model sees the contexts of its own thread, and only those that
    a plain function entered; while a coroutine or generator holds one, its forward is an error.

    Args:
        model: The root, or any module that holds roots.
        adapters: The adapter of each row, in a list; None for the plain base.
        repeat: Also accept batches in which each row stands `repeat` times in a row, as beam
            search makes them.

    Raises:
        StateError: There is no list of names. On entering: a name is unknown, the model is merged,
            or an adapter has what all rows share: sites that are read as a whole weight, or trained
            copies of other layers than linear ones and torch's norms. On leaving: a context that
            was entered later is still open.
        LayerError: In a forward, the batch is not as long as `adapters`, nor its multiple.

    Examples:
        >>> import torch
        >>> from lora_inject.core.model.inject import inject
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("sql", "style"):
        ...     _ = inject(net, {"rank": 1, "targets": ["0"]}, name)
        >>> with routed(net, ["sql", None, "style"]):
        ...     y = net(torch.ones(3, 4))
    """
    listed = "Give the adapter of each row in a list, None for the base"
    check_type("routed", adapters, Iterable, listed)
    if isinstance(adapters, str | bytes | Mapping | Set):  # of a string each letter is a name
        raise StateError("routed", f"it is {article(type(adapters).__name__)}", listed)
    rows = tuple(adapters)
    if not rows or repeat < 1:
        found_rows = f"got {len(rows)} rows and repeat={repeat}"
        raise StateError("routed()", found_rows, "Give one adapter for each row")
    return Reusable("routed()", lambda: _within_rows(model, rows, repeat))


def _within_rows(
    model: nn.Module, rows: tuple[str | None, ...], repeat: int
) -> AbstractContextManager[None]:
    """Check the names of rows, and return the context of one `with`."""
    names = dict.fromkeys(name for name in rows if name is not None)
    found = reach(model)
    check_names(found.names, names, "routed to")
    for name in found.whole.keys() & names.keys():
        raise StateError(
            f"routed to {name!r}",
            f"it changes {found.whole[name]!r} itself, which all rows of a batch share",
            "Route adapters on layers that are called, and train in full only linear layers and "
            "norms",
        )
    return within_state(model, State(rows=rows, repeat=repeat), "routed")


@contextmanager
def within_state(model: nn.Module, state: State, asked: str) -> Iterator[None]:
    """Run the body under a selection, of the calling thread or task only."""
    selections = reach(model).selections
    if not selections:
        raise StateError(asked, "the model has no adapter", "Inject or load one first")
    refuse_merged(asked, *selections)
    with within({selection: selection.prepared(state) for selection in selections}):
        yield
