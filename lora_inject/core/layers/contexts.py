"""Whose `routed` or `disabled` it is: the contexts of a thread or of an asyncio task.

A context variable keeps threads and tasks apart; a thread or task sees the contexts that it
inherits. As with `torch.no_grad`, a plain generator shares this variable with its consumer.

| a context is | `ENTERED` of its thread or task | what a forward there does |
|---|---|---|
| made | does not hold it | does not see it |
| open | holds it | runs under it, if it is the innermost of its selection |
| left | no longer holds it; a task that inherited it still does | raises in such a task |
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from lora_inject.core.layers.selection import ENTERED
from lora_inject.errors import StateError


class Context:
    """One entered `routed` or `disabled`, or one recomputation of a checkpointed function.

    Args:
        selected: Who takes part inside, of each selection.
        waits: Whether a coroutine holds it, which others may interrupt.
    """

    def __init__(self, selected: Mapping[Any, Any], *, waits: bool = False) -> None:
        self.selected = selected
        self.waits = waits
        self.left = False

    def enter(self) -> None:
        """Make the context the caller's innermost."""
        for selection, selected in self.selected.items():
            selection.follow(selected)
            selection.contexts.add(self)
        ENTERED.set((*ENTERED.get(), self))
        self._tell()

    def leave(self) -> None:
        """Take the context away again, as far as `enter` came; it may be called twice."""
        self.left = True
        ENTERED.set(tuple(context for context in ENTERED.get() if context is not self))
        for selection in self.selected:
            selection.contexts.discard(self)
        self._tell()

    def _tell(self) -> None:
        """Tell selections what dynamo cannot look up: whose a compiled forward of the thread is."""
        for selection in self.selected:
            selection.waits = any(each.waits for each in tuple(selection.contexts))
            here = [
                context.selected[selection]
                for context in ENTERED.get()
                if selection in context.selected and not (context.waits or context.left)
            ]
            selection.in_thread.selected = here[-1] if here else None

    def check_innermost(self) -> None:
        """Raise if the context cannot be left where the caller is; it is left all the same."""
        here = ENTERED.get()
        if self not in here:
            raise StateError(
                "leaving routed() or disabled()",
                "another thread or task entered it",
                "Leave a context where it was entered",
            )
        if any(not context.left for context in here[here.index(self) + 1 :]):
            raise StateError(
                "leaving routed() or disabled()",
                "a context that was entered later is still open",
                "Leave contexts in the reverse order of entering them",
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


@contextlib.contextmanager
def in_context(selected: Mapping[Any, Any], *, waits: bool = False) -> Iterator[None]:
    """Run the body in a new context."""
    context = Context(selected, waits=waits)
    try:
        try:
            context.enter()
            yield
            context.check_innermost()
        finally:
            context.leave()
    finally:
        context.leave()  # where an interrupt ended the first call
