"""The verb `routed`: an adapter for each row of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager

from torch import nn

from lora_inject.core.layers.contexts import held_by_coroutine
from lora_inject.core.roots.carried import check_names, reach
from lora_inject.core.roots.disabling import Reusable, selecting
from lora_inject.errors import StateError, article, check_type
from lora_inject.rows.by_row import Rows
from lora_inject.rows.kept import why_not_routed
from lora_inject.rows.token_ranges import TokenRanges


def routed(
    model: nn.Module,
    adapters: Iterable[str | None],
    *,
    repeat: int = 1,
    tokens: Iterable[int] | None = None,
) -> Reusable:
    """Return a context with one adapter for each row of the batch, in training as well.

    The context belongs to the thread or asyncio task that enters it. A task, or a thread of
    `asyncio.to_thread`, that is started inside sees it; a plain `threading.Thread` or a thread of
    an executor does not, and runs under the model's own setting. A plain generator cannot hold it,
    because whoever takes its values would run inside as well; a context manager made from one can.
    A compiled model sees the contexts of its own thread, and only those that a plain function
    entered; while a coroutine holds one, its forward is an error.

    Args:
        model: The root, or any module that holds roots.
        adapters: The adapter of each row, in a list; None for the plain base.
        repeat: Also accept batches in which each row stands `repeat` times in a row, as beam
            search makes them.
        tokens: For sequences that are packed into one row `(1, tokens)`: how many tokens each
            adapter has, in their order. The model must keep the sequences apart, as transformers
            does by `position_ids` that begin anew. Lengths with a large common divisor cost less.

    Raises:
        StateError: There is no list of names. On entering: a name is unknown, the model is merged,
            an adapter has what all rows share: sites that are read as a whole weight (transformers'
            stacks of experts aside), or trained copies of other layers than linear ones and torch's
            norms; or a generator enters it. On leaving: a context that was entered later is still
            open.
        LayerError: In a forward, the batch is not as long as `adapters`, nor its multiple, or does
            not have `tokens`.

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
    if wrong := [row for row in rows if row is not None and not isinstance(row, str)]:
        raise StateError("routed", f"a row is {wrong[0]!r}", listed)
    if not rows or type(repeat) is not int or repeat < 1:
        given = f"got {len(rows)} rows and repeat={repeat!r}"
        raise StateError(
            "routed()", given, "Give one adapter for each row; repeat is a whole number"
        )
    lengths = None if tokens is None else tuple(tokens)
    if lengths is not None:
        _check_tokens(rows, lengths, repeat)
    return Reusable("routed()", lambda: _by_rows(model, rows, repeat, lengths))


def _check_tokens(rows: Sequence[str | None], lengths: Sequence[int], repeat: int) -> None:
    """Refuse lengths of packed sequences that are not one for each adapter."""
    fits = len(lengths) == len(rows) and all(type(n) is int and n > 0 for n in lengths)
    if not fits or repeat != 1:
        given = f"got {len(rows)} adapters, tokens={list(lengths)} and repeat={repeat}"
        remedy = "Give the number of tokens of each packed sequence, one for each adapter, alone"
        raise StateError("routed()", given, remedy)


def _by_rows(
    model: nn.Module, rows: tuple[str | None, ...], repeat: int, lengths: Sequence[int] | None
) -> AbstractContextManager[None]:
    """Check the names of rows, and return the context of one `with`."""
    names = dict.fromkeys(name for name in rows if name is not None)
    check_names(reach(model).names, names, "routed to")
    reasons = why_not_routed(model)
    for name in reasons.keys() & names.keys():
        raise StateError(f"routed to {name!r}", *reasons[name])
    waits = held_by_coroutine("routed()")
    selected = Rows(rows, repeat) if lengths is None else TokenRanges(rows, lengths)
    return selecting(model, selected, "routed", waits=waits)
