"""How many Python functions a piece of work calls: exact, where a time would be noise."""

import gc
import sys
from collections.abc import Callable
from typing import Any


def python_calls(run: Callable[[], Any], *, inside: str = "") -> int:
    """Return how many functions and generators `run()` enters, in files whose path holds a text."""
    n_calls = 0

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal n_calls
        n_calls += event == "call" and inside in frame.f_code.co_filename

    gc.collect()
    gc.disable()  # what goes in a collection calls functions, and may be another test's
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return n_calls
