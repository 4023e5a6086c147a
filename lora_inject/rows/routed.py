"""The verbs `routed`, an adapter for each row of a batch, and `see_rows`, what it needs to know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_inject.core.layers.attached import Attached
from lora_inject.core.layers.survey import Survey, evaluating, unwrapped
from lora_inject.core.roots.root import adapted_modules, check_names, root_of
from lora_inject.core.roots.selecting import Context, check_mixes, selecting, weights_of
from lora_inject.core.spec.names import counted
from lora_inject.errors import LayerError, StateError, article, check_type
from lora_inject.rows.kept import Kept, random_kept
from lora_inject.rows.seen import Example, Routed, copied


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

    The model is called with the whole batch. Where it was seen that a layer does not get the rows
    first (positions that are looked up once, pictures), the batch runs once for each adapter. That
    is seen on an example, by `see_rows`; else the first call runs again, some times.

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
            a layer that does not get the rows first is called by itself; or a forward would have to
            run again that writes to a buffer, or adds to an attribute.

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


def see_rows(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    """See on an example which layers get the rows of a batch first, and note it for `routed`.

    A length that fits proves nothing: a table of positions may have as many as there are rows. So
    the model runs some times on the example, in evaluation mode: together and under each adapter.
    Buffers, which are copied, attributes and torch's generators are then as they were; no other
    thread may run the model meanwhile. Without an example, the first call under `routed` tells,
    unless its forward moves a state that later ones read.

    Args:
        model: The root, or a module that holds it.
        *args: What the model is called with. The first tensor has two rows or more.
        **kwargs: Likewise, by name.

    Returns:
        The names of adapted layers that do not get the rows first. Where there are any, a batch
        runs once for each adapter.

    Raises:
        StateError: The model has no adapter or is merged, there is no tensor, or it has one row.
        LayerError: The forward writes to a tensor that is no buffer, which cannot be put back.

    Examples:
        >>> import torch
        >>> from lora_inject.core.model.inject import inject
        >>> net = inject(nn.Sequential(nn.Linear(4, 4)), {"rank": 1, "targets": ["0"]}, "sql")
        >>> see_rows(net, torch.ones(2, 4))
        []
    """
    root_of(model, "see_rows", whole=False)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
    n = len(tensors[0]) if tensors else 0
    if n < 2:
        found = "no tensor is given" if not tensors else f"the first tensor has {counted(n, 'row')}"
        raise StateError("see_rows", found, "Give the arguments of a call, with two rows or more")
    survey = Survey(model)
    untold: set[Attached] = set()
    for names in _that_tell(survey, n - 1):
        rows = [(None, *names)[i % (len(names) + 1)] for i in range(n)]
        untold |= _seen_on(model, rows, args, kwargs)
    told = adapted_modules(survey)
    return [path for path, _, attached in told if attached.no_rows or attached in untold]


def _that_tell(survey: Survey, most: int) -> Iterator[list[str]]:
    """Yield adapters that have all adapted layers between them, some at a time."""
    of_layers: dict[str, set[Attached]] = {}
    for _, _, attached in adapted_modules(survey):
        for entry in attached.entries():
            of_layers.setdefault(entry.adapter, set()).add(attached)
    chosen, had = [], set[Attached]()
    for name, layers in of_layers.items():
        if layers - had:
            chosen.append(name)
            had |= layers
    for start in range(0, len(chosen), most):
        yield chosen[start : start + most]


def _seen_on(
    model: nn.Module, rows: list[str | None], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> set[Attached]:
    """Run an example with an adapter for each row, and return the layers that it does not tell."""
    kept = Kept(model, buffers=True)
    example = Example(rows, kept)
    try:
        with (
            torch.no_grad(),
            evaluating(model),
            random_kept(model),
            torch.compiler.set_stance("force_eager"),
            _routed(model, example),
        ):
            args, kwargs = copied((args, kwargs), tensors=True)
            unwrapped(model)(*args, **kwargs)
    finally:
        kept.put_back()
    if name := kept.written():
        raise LayerError(
            "see_rows",
            f"the forward writes to {name!r}, which is no buffer and cannot be put back",
            "Register it as a buffer of its module",
        )
    return example.untold


@contextmanager
def _routed(model: nn.Module, rows: Routed) -> Iterator[None]:
    """Check the names of rows, and run the body with them."""
    check_names(root_of(model, "routed", whole=False)[1], rows.names, "routed to")
    for row, mix in rows.mixes.items():
        if len(row) > 1 or any(weight != 1.0 for _, weight in row):
            check_mixes(model, mix.names)
    with selecting(model, rows, "routed", held=True), rows.watching(model):
        yield
