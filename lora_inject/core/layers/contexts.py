"""Whose `routed` or `disabled` it is: the contexts of a thread, an asyncio task or a generator.

A context variable keeps threads and tasks apart; a thread or task sees the contexts that it
inherits. A generator shares this variable with its consumer, so its contexts are also found by its
frame, which is on the stack while it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sys
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import FrameType
from typing import Any

from lora_inject.errors import StateError

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_PACKAGE = __name__.partition(".")[0]


class Context:
    """One entered `routed` or `disabled`, or one recomputation of a checkpointed function."""

    def __init__(self, states: Mapping[Any, Any], *, recomputes: bool = False) -> None:
        self.states = states  # of each selection inside
        self.shadowed: dict[Any, Any] = {}  # what compiled forwards of this thread ran under before
        self.recomputes = recomputes
        self.left = False
        frame = _entering_frame()
        flags = frame.f_code.co_flags
        # A generator or a coroutine, which others may interrupt.
        self.may_wait = bool(flags & (_GENERATOR | inspect.CO_COROUTINE))
        self._generator = frame if flags & _GENERATOR else None
        self._task = _task() if flags & inspect.CO_ASYNC_GENERATOR else None
        self._thread = threading.get_ident()
        self._is_open = self._is_closed = False

    def enter(self) -> None:
        """Make the context the caller's innermost."""
        others = entered()
        if self._task is not None and any(c._task and c.is_suspended() for c in others):
            raise StateError(
                "routed() or disabled()",
                "another asynchronous generator of this task holds such a context",
                "Run each of them in a task of its own",
            )
        inside = tuple(c for c in others if not c.left and not c.is_suspended())
        for selection, state in self.states.items():
            selection.entered(self, state)
        if self._generator is not None:
            _OF_GENERATORS[self._generator] = (*inside, self)
        _ENTERED.set((*inside, self))
        self._is_open = True

    def leave(self) -> None:
        """Undo `enter`, as far as it came; call it again if a call was interrupted.

        A context that is not the caller's innermost is left, too; then an error is raised.
        """
        if self._is_closed:
            return
        here = _ENTERED.get()
        above = here[here.index(self) + 1 :] if self in here else ()
        elsewhere = self._is_open and not self.left and self not in here
        self.left = True
        if self._generator is not None:
            rest = tuple(c for c in _OF_GENERATORS.get(self._generator, ()) if c is not self)
            if rest and rest[-1]._generator is self._generator:
                _OF_GENERATORS[self._generator] = rest
            else:
                _OF_GENERATORS.pop(self._generator, None)
        for selection in self.states:
            selection.was_left(self)
        _ENTERED.set(tuple(c for c in here if c is not self))
        self._is_closed = True
        if any(not c.left and not c.is_suspended() for c in above):
            raise StateError(
                "leaving routed() or disabled()",
                "a context that was entered later is still open",
                "Leave contexts in the reverse order of entering them",
            )
        if elsewhere and self._generator is None:
            raise StateError(
                "leaving routed() or disabled()",
                "another thread or task entered it",
                "Leave a context where it was entered",
            )

    def is_suspended(self) -> bool:
        """Whether a generator entered it and has yielded to the code that is running now."""
        if self._generator is None or self._generator.f_back is not None:
            return False
        # A generator that awaits a task or a thread has not yielded, and they run in its context.
        return self._task is None or self._task is _task()

    def of_this_thread(self) -> bool:
        """Whether the calling thread entered it."""
        return self._thread == threading.get_ident()


_ENTERED: ContextVar[tuple[Context, ...]] = ContextVar("lora_inject_contexts", default=())
# The contexts that each generator runs in which has entered one, the innermost last.
_OF_GENERATORS: dict[FrameType, tuple[Context, ...]] = {}


def entered() -> tuple[Context, ...]:
    """Return the contexts that the caller runs in, the innermost last."""
    found = _ENTERED.get()
    frame = sys._getframe(1) if _OF_GENERATORS else None
    while frame is not None:
        mine = _OF_GENERATORS.get(frame)
        if mine is not None:
            return found if mine[-1] in found else mine
        frame = frame.f_back
    return found


def innermost(selection: Any) -> Context | None:
    """Return the caller's innermost context of a selection, None where there is none."""
    contexts = entered() if _OF_GENERATORS else _ENTERED.get()
    for context in reversed(contexts) if contexts else ():
        if selection not in context.states or (context.left and context._generator is not None):
            continue
        if context.left:
            raise StateError(
                "a forward in a context that was inherited",
                "the thread or task that entered routed() or disabled() has left it",
                "Wait for what was started inside before leaving, or enter a context of its own",
            )
        if context.is_suspended():
            raise StateError(
                "a forward while a generator is suspended inside routed() or disabled()",
                "it cannot be told whether the forward belongs to that context",
                "Enter a context for this forward, close the generator first, or make the "
                "generator a context manager with contextlib.contextmanager",
            )
        return context
    return None


@contextlib.contextmanager
def within(states: Mapping[Any, Any], *, recomputes: bool = False) -> Iterator[None]:
    """Run the body in a new context."""
    context = Context(states, recomputes=recomputes)
    try:
        try:
            context.enter()
            yield
        finally:
            context.leave()
    finally:
        context.leave()  # where the first call was interrupted


def _entering_frame() -> FrameType:
    """Return the frame that enters a context: past this package and past context managers."""
    frame = sys._getframe(1)
    while (back := frame.f_back) is not None:
        name = frame.f_globals.get("__name__", "")
        managed = frame.f_code.co_flags & _GENERATOR and back.f_globals is contextlib.__dict__
        if name != "contextlib" and name.partition(".")[0] != _PACKAGE and not managed:
            break
        frame = back
    return frame


def _task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None
