"""Fewer looks for garbage while a verb makes many thousands of objects that stay.

After every few hundred of them Python would look through the young ones, and now and then through
all, for cycles that nobody holds; on a large model that takes longer than the verb's own work.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# New objects between two looks, some 200 MB of them; the collector is never off. Injecting 20,000
# sites makes 600,000, and a look at them would take 4 us a site of 55.
_MANY = 1_000_000


@contextmanager
def few_collections() -> Iterator[None]:
    """Let the collector wait for many more objects in the body, in all threads.

    A collector that is off, or waits for more, is left as it is. Of several verbs at a time the
    first one sets it, and sets it back.
    """
    young, *older = gc.get_threshold()
    seldom = 0 < young < _MANY
    if seldom:
        gc.set_threshold(_MANY, *older)
    try:
        yield
    finally:
        now, *older = gc.get_threshold()
        if seldom and now == _MANY:  # else somebody has set another meanwhile
            gc.set_threshold(young, *older)
