"""Regexes for the ends of names, run within a time limit.

A backtracking regex can take exponential time on a short name, and a config may be a stranger's.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache

import regex

from lora_inject.core.spec.names import show
from lora_inject.errors import LoraInjectError

NOT_A_REGEX = (re.error, regex.error, OverflowError, RecursionError)
MATCH_SECONDS = 5.0
"""For a pattern and all names; harmless ones take milliseconds."""


def checked_regex(text: str) -> str:
    """Return a regex for names; raise ValueError(found, remedy) where it is not one."""
    try:
        text.encode()  # half a surrogate pair is not text
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "possible nested set" and the like mean a mistake
            re.compile(text)
    except (*NOT_A_REGEX, UnicodeError, Warning) as problem:
        remedy = "Patterns are Python regexes; a literal dot is '\\.'"
        raise ValueError(f"{show(text)} is not a regex: {problem}", remedy) from None
    return text


@lru_cache(maxsize=1024)
def at_the_end(pattern: str) -> str:
    """Return a regex for whole names from one for their ends.

    Everything inside the pattern keeps its meaning: alternations, a leading `^` (the name's start),
    inline flags, verbose mode, group numbers and names.
    """
    verbose = bool(re.compile(pattern).flags & re.VERBOSE)
    # Global inline flags may only stand first.
    space = r"\s*" if verbose else ""
    flags = re.match(rf"(?:\(\?[aiLmsux]+\){space})*", pattern)
    body = pattern[flags.end() :] if flags else pattern
    # In verbose mode the line break ends a comment that would swallow the bracket.
    close = "\n)" if verbose else ")"
    return rf"{flags[0] if flags else ''}(?s:.*\.|)(?:{body}{close}\Z"


def in_time(
    pattern: str,
    names: Sequence[str],
    asked: str,
    error: type[LoraInjectError],
    end: float | None = None,
) -> list[str]:
    """Return the names that any pattern matches, within a time limit.

    A backtracking regex can take exponential time on a short name. `re` cannot be stopped, and is
    ten times as fast as `regex`, which can: so `re` matches only what cannot repeat much, with a
    look at the clock between names.

    Args:
        pattern: A regex for the ends of names.
        names: The names.
        asked: What messages call the pattern.
        error: What is raised if it is no regex, or takes too long.
        end: In seconds of this thread; by default MATCH_SECONDS from now.
    """
    end = time.thread_time() + MATCH_SECONDS if end is None else end
    try:
        match = _matcher(pattern, names, end)
    except NOT_A_REGEX as problem:
        raise error(asked, f"it is not a regex: {problem}", "Escape its brackets") from None
    hits: list[str] = []
    for start in range(0, len(names), _AT_ONCE):
        some = names[start : start + _AT_ONCE]
        try:
            hits += filter(match, some)
            late = time.thread_time() > end
        except TimeoutError:
            late = True
        if late:
            slow = f"it takes more than {MATCH_SECONDS:g} s to match, such as '{some[-1][:60]}'"
            remedy = "Write it without repetition inside repetition, such as (a+)+"
            raise error(asked, slow, remedy)
    return hits


_AT_ONCE = 16  # names between two looks at the clock
_LONGEST = 200  # characters of a name that `re` gets


def _matcher(pattern: str, names: Sequence[str], end: float) -> Callable[[str], object]:
    """Return the function that matches a name: of `re` if it tries few ways, else of `regex`."""
    whole = at_the_end(pattern)
    # A group that is repeated, or means more than itself, may hold anything.
    is_plain = not re.search(r"\(\?[^:]|\)\s*[*+{]", pattern)
    # A repetition may end at each of some 64 places, an alternative may be either.
    ways = 6 * len(re.findall(r"[*+{]", pattern)) + len(re.findall(r"[|?]", pattern))
    if is_plain and ways <= 18 and max(map(len, names), default=0) <= _LONGEST:
        return re.compile(whole).match
    compiled = stoppable(whole)
    # `timeout` counts other threads, too.
    return lambda name: compiled.match(name, timeout=max(end - time.thread_time(), 1e-6))


def stoppable(pattern: str) -> regex.Pattern[str]:
    """Return a regex of Python's syntax that takes a `timeout`; raise `re.error`, `regex.error`."""
    re.compile(pattern)
    # To `re`, a brace that is not a count is text; to `regex`, it may ask for a fuzzy match.
    brace = r"(?<!\\)((?:\\\\)*)(?<!\\N)\{(?!\d+(?:,\d*)?\}|,\d*\})"
    return regex.compile(re.sub(brace, r"\1\\{", pattern))
