"""Patterns on the ends of names: regexes, and a limit on the time that they may take."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from lora_inject.errors import LoraInjectError, MatchError

MATCH_SECONDS = 5.0  # for one pattern and all names; a harmless pattern takes milliseconds
_FEW_STEPS = 10_000_000  # which take a part of a second
_AT_ONCE = 16  # matches between two looks at the clock

INDEX = "(?:0|[1-9][0-9]{0,8})"  # no leading zeros: YAML reads 010 as 8, Python as 10
_NOT_A_REGEX = (re.error, OverflowError, RecursionError)


def matching(
    pattern: str,
    names: Iterable[str],
    *,
    asked: str,
    error: type[LoraInjectError] = MatchError,
    seconds: float = MATCH_SECONDS,
) -> list[str]:
    r"""Return the names that a pattern matches: their ends, from the start or just after a dot.

    A backtracking regex can take exponential time on a short name, so the processor time for all
    names together is limited, in `seconds`; `error` is raised then. `asked` is what messages call
    the pattern.

    Examples:
        >>> matching("q_proj", ["a.q_proj", "a.my_q_proj", "a.q_proj_norm"], asked="rule 1")
        ['a.q_proj']
    """
    names = list(names)
    if pattern.isidentifier():  # most are; a regex takes seven times as long for the same
        tail = f".{pattern}"
        return [name for name in names if name.endswith(tail) or name == pattern]
    end = time.process_time() + seconds
    try:
        if _steps(pattern, max(map(len, names), default=0)) <= _FEW_STEPS:
            return list(_matching_at_once(re.compile(_at_the_end(pattern)), names, end))
        from lora_inject.core.spec.timed_patterns import matching_in_time

        return list(matching_in_time(_at_the_end(pattern), names, end))
    except _NOT_A_REGEX as problem:
        raise error(asked, f"it is not a regex: {problem}", "Escape its brackets") from None
    except TimeoutError as late:
        what = f"it took more than {seconds:g} s to match (on '{late.args[0][:60]}')"
        remedy = "Write the pattern without repetition inside repetition, such as (a+)+"
        raise error(asked, what, remedy) from None


def _steps(pattern: str, length: int) -> float:
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
        if time.process_time() > end:
            raise TimeoutError(names[start])
        yield from filter(compiled.match, names[start : start + _AT_ONCE])


def checked_regex(text: str) -> str:
    """Return a regex for names; raise ValueError(found, remedy) where it is not one."""
    try:
        text.encode()  # half a surrogate pair is not text
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "possible nested set" and the like mean a mistake
            re.compile(text)
    except (*_NOT_A_REGEX, UnicodeError, Warning) as problem:
        from lora_inject.core.spec.words import show

        remedy = "Patterns are Python regexes; a literal dot is '\\.'"
        raise ValueError(f"{show(text)} is not a regex: {problem}", remedy) from None
    return text


@lru_cache(maxsize=1024)
def _at_the_end(pattern: str) -> str:
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
    return rf"{flags[0] if flags else ''}(?s:.*\.)?(?:{body}{close}\Z"
