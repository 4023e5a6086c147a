r"""PEFT's patterns for per-site numbers: written to hit one site each, read as PEFT reads them.

PEFT takes the first key of `rank_pattern` for which `re.match(r"(.*\.)?(KEY)$", name)` holds. A
key is written as a plain name where that hits nothing else (PEFT before 0.15 and some servers look
names up literally), and as `^` with an escaped name elsewhere. Such keys are looked up; any other
key of a file is run as the regular expression that it is, under a time limit.

Source: peft/utils/other.py, `get_pattern_key` (0.21.2).
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

import regex

from lora_inject.errors import FormatError
from lora_inject.spec.names import MATCH_SECONDS, matching

T = TypeVar("T", bound=Hashable)

_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")
_MAX_KEY_LENGTH = 1000


def values_of(table: Mapping[str, T], names: Collection[str], default: T) -> dict[str, T]:
    """Return the value that PEFT would take for each name: that of the first key that hits it."""
    values = dict.fromkeys(names, default)
    hits: dict[str, list[str]] = {key: [] for key in table}
    plain = _PlainKeys(key for key in table if _PLAIN.fullmatch(key))
    for name in values if table else ():
        for key in plain.hitting(name):
            hits[key].append(name)
    end = time.process_time() + MATCH_SECONDS
    for key in table:
        name = _unescaped(key)
        if key == _escaped(name):
            hits[key] += [name] if name in values else []
        elif not _PLAIN.fullmatch(key):
            hits[key] += _matches(key, names, end)
    for key in reversed([*table]):  # so that the first key stays
        values.update(dict.fromkeys(hits[key], table[key]))
    return values


def _matches(key: str, names: Collection[str], end: float) -> list[str]:
    asked = f"the key {key[:80]!r}"
    if len(key) > _MAX_KEY_LENGTH:
        raise FormatError(asked, f"it has {len(key):,} characters", "Write shorter patterns")
    seconds = max(end - time.process_time(), 0.001)
    try:
        return matching(key, names, asked=asked, error=FormatError, seconds=seconds)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        found = f"it is not a regular expression ({error})"
        raise FormatError(asked, found, "Write full module names, or correct it") from error


def _escaped(name: str) -> str:
    return "^" + re.escape(name)


def _unescaped(key: str) -> str:
    return re.sub(r"\\(.)", r"\1", key.removeprefix("^"))


class _PlainKeys:
    """Plain names as keys: each hits any end of a name after a dot, and its dots any character.

    They are looked up with the characters at their dots blanked, since comparing each of n names
    with each key would take minutes for the experts of a large model.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._groups: dict[int, dict[tuple[int, ...], set[str]]] = {}
        for key in keys:
            dots = tuple(n for n, character in enumerate(key) if character == ".")
            self._groups.setdefault(len(key), {}).setdefault(dots, set()).add(key)

    def hitting(self, name: str) -> Iterator[str]:
        """Yield the keys that hit a name."""
        for end in ends(name):
            for dots, keys in self._groups.get(len(end), {}).items():
                blanked = list(end)
                for dot in dots:
                    blanked[dot] = "."
                if (key := "".join(blanked)) in keys:
                    yield key


def ends(name: str) -> Iterator[str]:
    """Yield a name and all of its ends after a dot."""
    while name:
        yield name
        name = name.partition(".")[2]


def common(values: Iterable[T]) -> T | None:
    """The most frequent value, the first of them on a tie; None where there are none."""
    ranked = Counter(values).most_common(1)
    return ranked[0][0] if ranked else None


def pattern_keys(values: Mapping[str, T], default: T | None) -> dict[str, T]:
    """Return the pattern table that gives each site its value and hits nothing else wrongly.

    No two keys disagree about a site, so their order does not matter.
    """
    keys = _PlainKeys(values)
    unequal = {key for name in values for key in keys.hitting(name) if values[key] != values[name]}
    table = {}
    for name, value in values.items():
        if value != default:
            literal = bool(_PLAIN.fullmatch(name)) and name not in unequal
            table[name if literal else _escaped(name)] = value
    return dict(sorted(table.items()))
