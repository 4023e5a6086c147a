"""Patterns that repeat or choose: how long they may take, and a match that is given up in time."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence

from lora_inject.core.spec.timed_patterns import matching_in_time
from lora_inject.errors import LoraInjectError

FEW_STEPS = 10_000_000  # which take a part of a second
_AT_ONCE = 16  # matches between two looks at the clock


def matching_within(
    pattern: str,
    whole: str,
    names: Sequence[str],
    asked: str,
    error: type[LoraInjectError],
    seconds: float,
) -> list[str]:
    """Return the names that `whole` matches, which is made of a pattern; see `matching`."""
    end = time.thread_time() + seconds
    try:
        if steps_of(pattern, max(map(len, names), default=0)) <= FEW_STEPS:
            return list(_matching_at_once(re.compile(whole), names, end))
        return list(matching_in_time(whole, names, end))
    except TimeoutError as late:
        what = f"it took more than {seconds:g} s to match (on '{late.args[0][:60]}')"
        remedy = "Write the pattern without repetition inside repetition, such as (a+)+"
        raise error(asked, what, remedy) from None


def steps_of(pattern: str, length: int) -> float:
    """Return how many steps the match of a name of that length may take, at most.

    Repetitions divide a name among them, in one of `comb(length + n, n)` ways; a choice (`|`, `?`)
    goes one of two ways. What repeats a group may try every way to divide what it repeats: there is
    no such bound. Patterns that can be written in more ways (verbose, if only in a group; a set in
    a set) are not looked into.
    """
    plain = re.sub(r"(?s)\\.", "_", pattern)
    repeated_group, set_in_set, verbose = r"\)[*+?{]", r"\[[^]]*\[", r"\(\?[a-zA-Z]*x"
    re.compile(pattern)
    if re.search(f"{repeated_group}|{set_in_set}|{verbose}", plain):
        return math.inf
    repetitions = sum(map(plain.count, "*+{"))
    choices = plain.count("|") + plain.count("?") - plain.count("(?")
    ways = math.comb(length + repetitions, repetitions)
    return min(ways, 10**99) * 2.0 ** min(choices, 99)


def _matching_at_once(compiled: re.Pattern[str], names: Sequence[str], end: float) -> Iterator[str]:
    """Yield the names that match; the clock is asked for many of them together."""
    for start in range(0, len(names), _AT_ONCE):
        if time.thread_time() > end:
            raise TimeoutError(names[start])
        yield from filter(compiled.match, names[start : start + _AT_ONCE])
