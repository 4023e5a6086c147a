"""Running several tensor operations in a row without Python between them.

An operation on a block that fits a core's cache takes some ten microseconds. Two threads
that each issue such operations from Python spend as long again waiting for each other's turn at
the interpreter, and one thread still pays for every call. TorchScript runs a whole function with
the interpreter's lock released.

torch calls TorchScript deprecated, though it has nothing else that needs no C++ compiler. So what
is run here is always a plain Python function, which gives the same bits by itself, only slower;
where torch no longer compiles it, it is called as it is.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def scripted(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that runs without Python's lock where torch can compile it.

    It is compiled at its first call, which takes some ten milliseconds.

    Args:
        function: Of tensors, numbers and lists of them, in the Python that TorchScript knows.

    Examples:
        >>> @scripted
        ... def double(x: torch.Tensor) -> torch.Tensor:
        ...     return x + x
        >>> double(torch.ones(2)).tolist()
        [2.0, 2.0]
    """
    lock = threading.Lock()
    compiled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not compiled:
            with lock:
                if not compiled:
                    compiled.append(_compiled(function))
        return compiled[0](*args, **kwargs)

    return run


def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated, in whatever class torch says so
        try:
            found: Callable[P, R] = torch.jit.script(function)
            optimizing = torch.jit.optimized_execution  # type: ignore[attr-defined]
        except (AttributeError, OSError, RuntimeError):  # gone, no source to read, not supported
            return function

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # Optimizing takes 30 ms of the first two calls, and finds nothing to join on a CPU.
        with optimizing(False):
            return found(*args, **kwargs)

    return run
