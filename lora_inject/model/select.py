"""Choosing among adapters: which take part, for how much, for which rows.

A verb here puts another `State` into the selection that all layers share. It touches no
layer, no parameter and no `requires_grad`, so it costs the same for ten sites as for ten thousand.

Not thread-safe: one selection serves the forwards of one thread.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from torch import nn

from lora_inject.errors import StateError
from lora_inject.layers.attached import attached_to
from lora_inject.layers.selection import BASE, State
from lora_inject.layers.survey import Survey
from lora_inject.model.carried import adapted_modules, check_names, reach, refuse_merged
from lora_inject.spec.names import joined

M = TypeVar("M", bound=nn.Module)


def activate(model: M, which: str | Mapping[str, float] | None) -> M:
    """Choose the adapters that take part from here on.

    Args:
        model: The root, or any module that holds roots.
        which: One adapter; a mix of several with their weights (`W + sum of w * scale * B @ A`);
            or None for the plain base.

    Returns:
        The same object.

    Raises:
        StateError: A name is unknown, a weight is not finite, or the model is merged.

    Example:
        >>> from lora_inject.model.inject import inject
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("sql", "style"):
        ...     _ = inject(net, {"rank": 1, "targets": ["0"]}, name)
        >>> _ = activate(net, {"sql": 0.7, "style": 0.3})
    """
    weights = _weights(which)
    found = reach(model)
    if not found.selections:
        raise StateError("activate", "the model carries no adapter", "Inject or load one first")
    check_names(found.names, weights, "activate")
    for selection in found.selections:
        refuse_merged(selection, "activate")
        selection.check_settled("activate")
    state = _mix(tuple(weights.items()))
    for selection in found.selections:
        selection.replace(state)
    return model


@functools.lru_cache(maxsize=256)
def _mix(active: tuple[tuple[str, float], ...]) -> State:
    """Return the state of a mix: who switches to and fro makes each once."""
    return State(active=active) if active else BASE


def _weights(which: str | Mapping[str, float] | None) -> dict[str, float]:
    if which is None:
        return {}
    if isinstance(which, str):
        return {which: 1.0}
    if not isinstance(which, Mapping):
        raise StateError(
            "activate",
            f"got a {type(which).__name__}",
            "Give a name, a mapping of names to weights, or None",
        )
    for name, weight in which.items():
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise StateError(
                f"activate {name!r}", f"its weight is {weight!r}", "Give a finite number"
            )
    return {name: float(weight) for name, weight in which.items()}


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run the body with the plain base model: no adapter takes part.

    Args:
        model: The root, or any module that holds roots.

    Raises:
        StateError: The model is merged, and so there is no plain base.
    """
    with _within(model, BASE, "disabled"):
        yield


@contextmanager
def routed(model: nn.Module, adapters: Sequence[str | None], *, repeat: int = 1) -> Iterator[None]:
    """Run the body with one adapter for each row of the batch, in training as well.

    Args:
        model: The root, or any module that holds roots.
        adapters: The adapter of each row; None for the plain base.
        repeat: Also accept batches in which each row stands `repeat` times in a row, as beam
            search makes them.

    In eval mode without gradients each layer keeps what it gathered until the context ends, at
    most twice the memory of the adapters. New values of A and B are noticed, also those of an
    optimiser; only what is written through `.data` inside the context is not.

    Raises:
        StateError: A name is unknown, the model is merged, or an adapter has sites that are
            mounted by weight or full trained copies: a batch shares one weight.
        LayerError: In a forward, the batch is not as long as `adapters`, nor its multiple.
    """
    rows = tuple(adapters)
    if not rows or repeat < 1:
        raise StateError(
            "routed()", f"got {len(rows)} rows and repeat={repeat}", "Give one adapter for each row"
        )
    names = dict.fromkeys(name for name in rows if name is not None)
    check_names(reach(model).names, names, "routed to")
    for path, module in adapted_modules(Survey(model)).items():
        attached = attached_to(module)
        for param, entries in attached.reads.items() if attached else ():
            for name in entries.keys() & names.keys():
                raise StateError(
                    f"routed to {name!r}",
                    f"it reads {joined(path, param)!r} as a whole weight, which a batch shares",
                    "Route only adapters on layers that are called, without train or bias entries",
                )
    state = State(rows=rows, repeat=repeat)
    try:
        with _within(model, state, "routed"):
            yield
    finally:
        state.kept.clear()


@contextmanager
def _within(model: nn.Module, state: State, asked: str) -> Iterator[None]:
    selections = reach(model).selections
    if not selections:
        raise StateError(asked, "the model carries no adapter", "Inject or load one first")
    for selection in selections:
        refuse_merged(selection, asked)
    with ExitStack() as stack:
        for selection in selections:
            stack.enter_context(selection.within(state))
        yield
