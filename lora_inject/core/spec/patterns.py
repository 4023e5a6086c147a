"""Patterns: regexes for the ends of names, in the layers that a rule asks for.

A pattern means the names that it ends; an entry of `exclude`, `train` or of a verb's patterns also
what lies below.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import regex

from lora_inject.core.spec.names import Below, around, first_number, nearest, show
from lora_inject.errors import LoraInjectError, MatchError, StateError, check_list, check_type

INDEX = "(?:0|[1-9][0-9]{0,8})"  # no leading zeros: YAML reads 010 as 8, Python as 10
NOT_A_REGEX = (re.error, regex.error, OverflowError, RecursionError)
MATCH_SECONDS = 5.0
"""For a pattern and all names; harmless ones take milliseconds."""


def matching(
    pattern: str,
    names: Iterable[str],
    *,
    asked: str,
    error: type[LoraInjectError] = MatchError,
) -> list[str]:
    r"""Return the names that a pattern matches: their ends, from the start or just after a dot.

    `asked` is what messages call the pattern.

    Examples:
        >>> matching("q_proj", ["a.q_proj", "a.my_q_proj", "a.q_proj_norm"], asked="rule 1")
        ['a.q_proj']
    """
    if pattern.isidentifier():  # most are; a regex takes seven times as long for the same
        tail = f".{pattern}"
        return [name for name in names if name.endswith(tail) or name == pattern]
    return in_time(pattern, list(names), asked, error)


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


def under(
    pattern: str,
    names: Iterable[str],
    known: Iterable[str],
    *,
    asked: str,
    error: type[LoraInjectError] = MatchError,
) -> list[str]:
    """Return those of `names` that an entry means: what it ends of all `known`, and what is below.

    Examples:
        >>> under("mlp", ["mlp.up.weight", "norm.weight"], ["mlp", "mlp.up", "norm"], asked="train")
        ['mlp.up.weight']
    """
    below = Below(matching(pattern, known, asked=asked, error=error))
    return [name for name in names if name in below]


def named(
    names: Iterable[str],
    patterns: Iterable[str],
    asked: str,
    error: type[LoraInjectError] = StateError,
) -> dict[str, None]:
    """Return the names that patterns match, directly or by a module around; each must match."""
    names = list(names)
    chosen: dict[str, None] = {}
    modules = [*names, *around(names)]
    for pattern in in_a_list(patterns, asked, error):
        matched = under(pattern, names, modules, asked=f"{asked} {pattern!r}", error=error)
        if not matched:
            close = ", ".join(map(repr, nearest(pattern, modules))) or "none"
            raise error(f"{asked} {pattern!r}", "it matches nothing", f"Nearest: {close}")
        chosen |= dict.fromkeys(matched)
    return {name: None for name in names if name in chosen}


def in_a_list(
    patterns: Iterable[str], asked: str, error: type[LoraInjectError] = StateError
) -> Iterator[str]:
    """Yield the patterns of a list; a string by itself would be one pattern for each letter."""
    check_list(asked, patterns, "Give a list of patterns", error)
    for pattern in patterns:
        check_type(f"{asked}, a pattern", pattern, str, "Give a regex for the end of a name", error)
        yield pattern


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


# ------------------------------------------------------------------------------------------ layers


def layer_range(value: object) -> str:
    """Return a range as text, `4` or `16-31`; raise ValueError(found, remedy) for other values."""
    text = str(value) if type(value) is int else value
    match = re.fullmatch(rf"({INDEX})(?:-({INDEX}))?", text) if isinstance(text, str) else None
    if match is None or int(match[1]) > int(match[2] or match[1]):
        raise ValueError(f"{show(value)} is not a range of layers", "Write 16-31, or [0, 4, 8-11]")
    return match[0]


def in_layers(
    layers: Sequence[str], names: Sequence[str], label: str, every: Iterable[str]
) -> list[str]:
    """Return the names in these layers; raise if there are none, or for layers that do not exist.

    `every` has all names of the model: what one rule matches need not be in each of its layers.
    """
    ends = {text: [int(end) for end in text.split("-")] for text in layers}
    spans = {text: range(end[0], end[-1] + 1) for text, end in ends.items()}
    kept = [name for name in names if any(first_number(name) in span for span in spans.values())]
    lists = {_list_of(name) for name in names}
    there = {
        n for name in every if (n := first_number(name)) is not None and _list_of(name) in lists
    }
    missing = [text for text, span in spans.items() if not (kept and there.issuperset(span))]
    if not missing:
        return kept
    problem = f"it does not find all of layers {', '.join(missing)}"
    if not there:
        raise MatchError(label, problem, "Remove layers; no name that it matches has one")
    raise MatchError(label, problem, f"Its layers are {min(there)} to {max(there)}")


def _list_of(name: str) -> str | None:
    """Return the list of modules that the first number in a name counts."""
    match = re.match(r"(.*?)(?:^|\.)[0-9]+(?:\.|$)", name)
    return None if match is None else match[1]
