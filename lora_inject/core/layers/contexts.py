"""Whose `routed` or `disabled` it is: the contexts of a thread or of an asyncio task.

A context variable keeps threads and tasks apart; a thread or task sees the contexts that it
inherits. A plain generator shares this variable with its consumer, so it may not hold a context
while it is suspended: entering one there is refused. What contextlib runs as a context manager is
no such generator.

A context goes through three states:

| state | `ENTERED` of its thread or task | what a forward there does |
|---|---|---|
| made | does not hold it | does not see it |
| open | holds it | runs under it, if it is the innermost of its selection |
| left | no longer holds it; a task that inherited it still does | raises in such a task |
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from lora_inject.core.functional.torch_stack import entering_code
from lora_inject.core.layers.selected import ENTERED
from lora_inject.errors import StateError

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class Context:
    """One entered `routed` or `disabled`, or one recomputation of a checkpointed function.

    Args:
        selected: Who takes part inside, of each selection.
        waits: Whether a coroutine holds it, which others may interrupt.
    """

    def __init__(self, selected: Mapping[Any, Any], *, waits: bool = False) -> None:
        self.selected = selected
        self.shadowed: dict[Any, Any] = {}  # of this thread's compiled forwards
        self.waits = waits
        self.left = False
        self._thread = threading.get_ident()
        self._is_open = False
        self._is_closed = False

    def enter(self) -> None:
        """Make the context the caller's innermost."""
        for selection in self.selected:
            self._begin(selection)
        ENTERED.set((*ENTERED.get(), self))
        self._is_open = True

    def leave(self) -> None:
        """Take the context away again, as far as `enter` came.

        It may be called again if an interrupt ended a call. A context that is not the caller's
        innermost is left as well; then an error is raised.
        """
        if self._is_closed:
            return
        here = ENTERED.get()
        above = here[here.index(self) + 1 :] if self in here else ()
        elsewhere = self._is_open and not self.left and self not in here
        self.left = True
        for selection in self.selected:
            self._end(selection)
        ENTERED.set(tuple(context for context in here if context is not self))
        self._is_closed = True
        if any(not context.left for context in above):
            raise StateError(
                "leaving routed() or disabled()",
                "a context that was entered later is still open",
                "Leave contexts in the reverse order of entering them",
            )
        if elsewhere:
            raise StateError(
                "leaving routed() or disabled()",
                "another thread or task entered it",
                "Leave a context where it was entered",
            )

    def in_force(self, selection: Any) -> Any:
        """Return who takes part of a selection, in a forward that runs in this context.

        Raises:
            StateError: The caller inherited it, and who entered it has left it since.
        """
        if self.left:
            raise StateError(
                "a forward in a context that was inherited",
                "the thread or task that entered routed() or disabled() has left it",
                "Wait for what was started inside before leaving, or enter a context of its own",
            )
        return self.selected[selection]

    def _begin(self, selection: Any) -> None:
        """Let a selection know that this context begins."""
        selected = self.selected[selection]
        selection.follow(selected)
        selection.contexts.add(self)
        selection.waits = any(each.waits for each in tuple(selection.contexts))
        if not self.waits:
            self.shadowed[selection] = getattr(selection.in_thread, "selected", None)
            selection.in_thread.selected = selected

    def _end(self, selection: Any) -> None:
        """Let a selection know that this context ends."""
        if selection in self.shadowed and self._thread == threading.get_ident():
            selection.in_thread.selected = self.shadowed.pop(selection)
        selection.contexts.discard(self)
        selection.waits = any(each.waits for each in tuple(selection.contexts))


@contextlib.contextmanager
def in_context(selected: Mapping[Any, Any], *, waits: bool = False) -> Iterator[None]:
    """Run the body in a new context."""
    context = Context(selected, waits=waits)
    try:
        try:
            context.enter()
            yield
        finally:
            context.leave()
    finally:
        context.leave()  # where an interrupt ended the first call


def held_by_coroutine(asked: str) -> bool:
    """Return whether a coroutine enters a context.

    Raises:
        StateError: A generator enters it. Between its steps its consumer would run inside, too.
    """
    flags = entering_code()
    if flags & _GENERATOR:
        raise StateError(
            asked,
            "a generator entered it, and whoever takes its values would run inside as well",
            "Put the with statement around each forward of the generator, or make the generator a "
            "context manager with contextlib.contextmanager",
        )
    return bool(flags & inspect.CO_COROUTINE)
