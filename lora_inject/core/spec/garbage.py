"""Fewer looks for garbage while a verb makes many thousands of objects that stay.

After every few hundred of them Python would look through the young ones, and now and then through
all, for cycles that nobody holds; on a large model that takes longer than the verb's own work.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

# New objects between two looks, some 200 MB of them; the collector is never off. Injecting 20,000
# sites makes 600,000, and a look at them would take 4 us a site of 55.
_MANY = 1_000_000

_lock = Lock()
_inside = 0  # how many threads, and verbs in verbs, are in `few_collections`
_usual = 0  # the threshold before the first of them


@contextmanager
def few_collections() -> Iterator[None]:
    """Let the collector wait for many more objects in the body, in all threads.

    A collector that is off, or waits for more, is left as it is.
    """
    global _inside, _usual  # noqa: PLW0603 - the collector's threshold is one for the process
    with _lock:
        young, *older = gc.get_threshold()
        if not _inside:
            _usual = young
            if 0 < young < _MANY:
                gc.set_threshold(_MANY, *older)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            now, *older = gc.get_threshold()
            if not _inside and now == _MANY:  # else somebody has set another meanwhile
                gc.set_threshold(_usual, *older)
