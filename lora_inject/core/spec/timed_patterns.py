"""Patterns that may take very long, matched by `regex`, which can limit the time."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import regex


def matching_in_time(pattern: str, names: Sequence[str], seconds: float) -> Iterator[str]:
    """Yield the names that match; each match may take the time that is left."""
    compiled, end = _timed(pattern), time.thread_time() + seconds
    for name in names:
        try:
            left = end - time.thread_time()  # `timeout` counts other threads, too
            if compiled.match(name, timeout=max(left, 1e-6)):
                yield name
        except TimeoutError:
            raise TimeoutError(name) from None


@lru_cache(maxsize=1024)
def _timed(pattern: str) -> Any:
    """Return a pattern compiled by `regex`."""
    # To `re`, a brace that is not a count is text; to `regex`, it may ask for a fuzzy match.
    brace = r"(?<!\\)((?:\\\\)*)(?<!\\N)\{(?!\d+(?:,\d*)?\}|,\d*\})"
    try:
        return regex.compile(re.sub(brace, r"\1\\{", pattern))
    except regex.error as problem:  # such as [a[:b], which only `re` reads
        raise re.error(str(problem)) from None
