"""Which adapters take part: for all threads, or for the thread or asyncio task of a context.

No layer, no parameter and no `requires_grad` is touched: of each layer is asked whether it is still
in its place, as one that was replaced would be left out in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from numbers import Real
from typing import Any, NoReturn, TypeVar

from torch import nn

from lora_inject.core.functional.torch_inside import coroutine_enters
from lora_inject.core.layers.attached import Entry, check_mixed
from lora_inject.core.layers.selection import Mix, Selected, in_context
from lora_inject.core.roots.root import (
    Injected,
    alone,
    check_names,
    check_unmerged,
    entries,
    root_of,
)
from lora_inject.errors import StateError, check_type

M = TypeVar("M", bound=nn.Module)


@alone
def activate(model: M, which: str | Mapping[str, float] | None) -> M:
    """Choose the adapters that take part from here on, in all threads.

    It is a change between forwards: one that runs in another thread meanwhile may compute some of
    its layers by either setting. What each thread wants for itself is `routed`.

    On CUDA this is an operation of the current stream: compiled forwards in another stream have to
    wait for it.

    Args:
        model: The root, or a module that holds it.
        which: One adapter; a mix of several with their weights (`W + sum of w * scale * B @ A`);
            or None, like an empty mix, for the plain base.

    Returns:
        The same object.

    Raises:
        StateError: A name is unknown, a weight is no number, or the model is merged.
        LayerError: An adapter with a gain (DoRA) is not the only one at one of its sites.

    Examples:
        >>> from lora_inject.core.model.inject import inject
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("sql", "style"):
        ...     _ = inject(net, {"rank": 1, "targets": ["0"]}, name)
        >>> _ = activate(net, {"sql": 0.7, "style": 0.3})
    """
    weights = weights_of(which, "activate")
    _, root = root_of(model, "activate")
    check_names(root, weights, "activate")
    check_unmerged("activate", root)
    check_mixes(model, weights)
    root.selection.check_settled("activate")
    root.selection.replace(Mix(weights))
    return model


def weights_of(which: str | Mapping[str, float] | None, verb: str) -> dict[str, float]:
    """Return the weights of a name, of a mix, or of nothing."""
    if which is None or isinstance(which, str):
        return {} if which is None else {which: 1.0}
    check_type(verb, which, Mapping, "Give a name, a mapping of names to weights, or None")
    for name, weight in which.items():
        asked, remedy = f"{verb}, the weight of {name!r}", "Give a number below 1e38"
        check_type(asked, weight, Real, remedy)
        if not abs(weight) <= 1e38:  # what float32 can hold
            raise StateError(asked, f"it is {weight!r}", remedy)
    return {name: float(weight) for name, weight in which.items()}


def check_mixes(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Raise if an adapter with a gain would not be alone at a site, with weight 1."""
    if list(weights.values()) == [1.0]:
        return
    _, root = root_of(model, "mix", whole=False)
    if not any(root.adapters[name].gained for name in weights):
        return
    taking: dict[tuple[int, str], list[tuple[Entry, float]]] = {}
    survey = Injected(model, "mix")
    for name, weight in weights.items():
        for _, module, entry in entries(survey, name):
            taking.setdefault((id(module), entry.param), []).append((entry, weight))
    for each in taking.values():
        check_mixed(each)


class Context(AbstractContextManager[None]):
    """A context that is entered by `with` alone.

    A decorated coroutine or generator would run its body once the context has been left.
    """

    def __init__(self, asked: str, inside: AbstractContextManager[None]) -> None:
        self.asked, self.inside = asked, inside

    def __enter__(self) -> None:
        self.inside.__enter__()

    def __exit__(self, *raised: Any) -> bool | None:
        return self.inside.__exit__(*raised)

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse to decorate a function."""
        asked, remedy = f"{self.asked}(...)", f"Write with {self.asked}(...): in the function"
        raise StateError(asked, "it is a context and decorates nothing", remedy)


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which the plain base model runs: no adapter takes part.

    As with `routed`, other threads and tasks are not affected.

    Args:
        model: The root, or a module that holds it.

    Raises:
        StateError: On entering: the model is merged, and so there is no plain base.

    Examples:
        >>> import torch
        >>> from lora_inject.core.model.inject import inject
        >>> net = inject(nn.Sequential(nn.Linear(4, 4)), {"rank": 1, "targets": ["0"]})
        >>> with disabled(net):
        ...     y = net(torch.ones(2, 4))
    """
    return Context("disabled", selecting(model, Mix(), "disabled", held=True))


@contextmanager
def selecting(
    model: nn.Module, selected: Selected, asked: str, *, held: bool = False
) -> Iterator[None]:
    """Run the body with others taking part, for the calling thread or task only.

    `held` says that the body is the caller's, which may be a coroutine.
    """
    _, root = root_of(model, asked)
    check_unmerged(asked, root)
    with in_context({root.selection: selected}, waits=held and coroutine_enters()):
        yield
