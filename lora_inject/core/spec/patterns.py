"""Patterns on the ends of names: regexes, with a limit on the time that a stranger's may take."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import regex

from lora_inject.core.spec.words import show
from lora_inject.errors import LoraInjectError, MatchError

MATCH_SECONDS = 5.0  # for a stranger's pattern and all names; a harmless one takes milliseconds
INDEX = "(?:0|[1-9][0-9]{0,8})"  # no leading zeros: YAML reads 010 as 8, Python as 10
NOT_A_REGEX = (re.error, OverflowError, RecursionError)


def matching(
    pattern: str,
    names: Iterable[str],
    *,
    asked: str,
    error: type[LoraInjectError] = MatchError,
    seconds: float | None = None,
) -> list[str]:
    r"""Return the names that a pattern matches: their ends, from the start or just after a dot.

    A backtracking regex can take exponential time on a short name. So one that comes with a file
    gets `seconds` of processor time for all names together; then `error` is raised. `asked` is what
    messages call the pattern.

    Examples:
        >>> matching("q_proj", ["a.q_proj", "a.my_q_proj", "a.q_proj_norm"], asked="rule 1")
        ['a.q_proj']
    """
    names = list(names)
    if pattern.isidentifier():  # most are; a regex takes seven times as long for the same
        tail = f".{pattern}"
        return [name for name in names if name.endswith(tail) or name == pattern]
    try:
        whole = _at_the_end(pattern)
        if seconds is None:
            return list(filter(re.compile(whole).match, names))
        return list(matching_in_time(whole, names, seconds))
    except TimeoutError as late:
        what = f"it took more than {seconds:g} s to match (on '{late.args[0][:60]}')"
        remedy = "Write the pattern without repetition inside repetition, such as (a+)+"
        raise error(asked, what, remedy) from None
    except NOT_A_REGEX as problem:
        raise error(asked, f"it is not a regex: {problem}", "Escape its brackets") from None


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
