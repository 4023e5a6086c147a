"""What the stack of the calling thread tells: which forward or trace runs, who enters a context."""

from __future__ import annotations

import contextlib
import inspect
import sys
from types import CodeType, FrameType
from typing import Any

import torch

_PACKAGE = __name__.partition(".")[0]
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR

# -------------------------------------------------------------------------------------- forwards


def in_forward() -> bool:
    """Whether a module is being called, as far as the stack of the calling thread tells."""
    if torch.compiler.is_compiling():  # what is compiled is a forward
        return True
    return _runs(getattr(torch.nn.Module, "_call_impl", None))


def _runs(function: Any) -> bool:
    """Whether the calling thread runs a function, which None never is."""
    return _frame_of(getattr(function, "__code__", None)) is not None


def _frame_of(code: CodeType | None) -> FrameType | None:
    """Return the innermost frame of the calling thread that runs some code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def module_calling(code: CodeType) -> str:
    """Return the name of the module whose code called the innermost running function of a code."""
    frame = _frame_of(code)
    caller = None if frame is None else frame.f_back
    return "" if caller is None else caller.f_globals.get("__name__", "")


def in_symbolic_trace() -> bool:
    """Whether torch.fx.symbolic_trace runs what calls this, as far as the stack tells."""
    return not torch.compiler.is_compiling() and _runs(torch.fx.Tracer.trace)


# ------------------------------------------------------------------------------------- contexts


def entering_code() -> int:
    """Return the flags of the code that enters a context: `inspect.CO_GENERATOR` and the like.

    That is the innermost frame outside of this package, of contextlib, and of generators that
    contextlib runs as context managers.
    """
    frame = sys._getframe(1)
    while (back := frame.f_back) is not None:
        name = frame.f_globals.get("__name__", "")
        managed = frame.f_code.co_flags & _GENERATOR and back.f_globals is contextlib.__dict__
        if name != "contextlib" and name.partition(".")[0] != _PACKAGE and not managed:
            break
        frame = back
    return frame.f_code.co_flags
