r"""PEFT's patterns of names, as PEFT reads them.

Of `rank_pattern` PEFT takes the first key for which `re.match(r"(.*\.)?(KEY)$", name)` holds. Keys
that are plain names are looked up; any other is run as the regular expression that it is, under a
time limit.

Source: peft 0.21.2, utils/other.py, `get_pattern_key`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TypeVar

from lora_inject.core.spec.regexes import MATCH_SECONDS, in_time
from lora_inject.errors import FormatError

T = TypeVar("T")

_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")
_MAX_KEY_LENGTH = 1000


def values_of(table: Mapping[str, T], names: Collection[str], default: T) -> dict[str, T]:
    """Return the value that PEFT would take for each name: that of the first key that hits it."""
    values = dict.fromkeys(names, default)
    hits: dict[str, list[str]] = {key: [] for key in table}
    plain = PlainKeys(filter(is_plain, table))
    for name in values if table else ():
        for key in plain.hitting(name):
            hits[key].append(name)
    end = time.thread_time() + MATCH_SECONDS  # for all patterns of a file
    for key in table:
        name = re.sub(r"\\(.)", r"\1", key.removeprefix("^"))
        if key == escaped(name):
            hits[key] += [name] if name in values else []
        elif not is_plain(key):
            hits[key] += matching_in_time(key, names, f"the key {key[:80]!r}", end)
    for key in reversed([*table]):  # so that the first key stays
        values.update(dict.fromkeys(hits[key], table[key]))
    return values


def matching_in_time(
    pattern: str, names: Collection[str], asked: str, end: float | None = None
) -> list[str]:
    """Return the names that a stranger's pattern matches, as `matching` does.

    `end` is in seconds of this thread, by default MATCH_SECONDS from now.
    """
    if len(pattern) > _MAX_KEY_LENGTH:
        raise FormatError(asked, f"it has {len(pattern):,} characters", "Write shorter patterns")
    return in_time(pattern, list(names), asked, FormatError, end)


def is_plain(key: str) -> bool:
    """Whether a key is a name with nothing of a regex in it but dots."""
    return bool(_PLAIN.fullmatch(key))


def escaped(name: str) -> str:
    """Return the key that hits this whole name only."""
    return "^" + re.escape(name)


class PlainKeys:
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
