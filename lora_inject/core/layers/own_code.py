"""Where a layer's own code runs, which finds its own parameters rather than W + delta.

Two kinds of code do: the forward to whose output the update is added, and what keeps or writes the
parameters themselves, such as `reset_parameters`. Each says so for its thread while it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class OwnCode(threading.local):
    """The innermost such code of a thread: the `Attached` of its layer, or None.

    Attributes:
        adds: Of a forward to whose output the update is added.
        keeps: Of code that finds the parameters themselves.
        replaces: Whether that code may put others in their place, as `load_state_dict` does.
    """

    adds: Any = None
    keeps: Any = None
    replaces = False


OWN = OwnCode()


@contextmanager
def keeping(attached: Any, *, replaces: bool = False) -> Iterator[None]:
    """Let the code inside find the parameters of a layer themselves."""
    before = OWN.keeps, OWN.replaces
    OWN.replaces = replaces or (OWN.replaces and OWN.keeps is attached)
    OWN.keeps = attached
    try:
        yield
    finally:
        OWN.keeps, OWN.replaces = before
