"""The verb `routed`: an adapter for each row of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from lora_inject.core.roots.root import check_names, root_of
from lora_inject.core.roots.selecting import Context, check_mixes, selecting, weights_of
from lora_inject.errors import StateError, article, check_type
from lora_inject.rows.seen import Routed


def routed(
    model: nn.Module,
    adapters: Iterable[str | Mapping[str, float] | None],
    *,
    repeat: int = 1,
) -> AbstractContextManager[None]:
    """Return a context with one adapter for each row of the batch, in training as well.

    The context belongs to the thread or asyncio task that enters it. A task, or a thread of
    `asyncio.to_thread`, that is started inside sees it; a plain `threading.Thread` or a thread of
    an executor does not, and runs under the model's own setting. As with `torch.no_grad`, whoever
    takes the values of a plain generator that holds it runs inside as well. A compiled model sees
    the contexts of its own thread, and only those that a plain function entered; while a coroutine
    holds one, its forward is an error.

    The model is called with the whole batch. Where the first call shows that a layer does not get
    the rows first (positions that are looked up once, pictures), the batch runs once for each
    adapter, as long as it does.

    Args:
        model: The root, or a module that holds it.
        adapters: The adapter of each row, or a mix of adapters by weight, in a list; None for the
            plain base.
        repeat: Also accept batches in which each row stands `repeat` times in a row, as beam
            search makes them.

    Raises:
        StateError: There is no list of names. On entering: a name is unknown, or the model is
            merged. On leaving: a context that was entered later is still open.
        LayerError: In a forward, the outputs are not as long as `adapters`, nor their multiple; or
            a layer that does not get the rows first is called by itself, or in a model that keeps a
            cache.

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
    for row in rows:
        if row is not None and not isinstance(row, str | Mapping):
            raise StateError("routed", f"a row is {row!r}", listed)
        weights_of(row, "routed to")
    if not rows or type(repeat) is not int or repeat < 1:
        given = f"got {len(rows)} rows and repeat={repeat!r}"
        raise StateError("routed()", given, "Give one adapter for each row, and a whole repeat")
    return Context("routed", _routed(model, Routed(rows, repeat)))


@contextmanager
def _routed(model: nn.Module, rows: Routed) -> Iterator[None]:
    """Check the names of rows, and run the body with them."""
    check_names(root_of(model, "routed", whole=False)[1], rows.names, "routed to")
    for row, mix in rows.mixes.items():
        if len(row) > 1 or any(weight != 1.0 for _, weight in row):
            check_mixes(model, mix.names)
    with selecting(model, rows, "routed", held=True), rows.watching(model):
        yield
