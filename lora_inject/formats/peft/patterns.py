r"""PEFT's patterns for per-site numbers: written to hit one site each, read without a regex.

PEFT takes the first key of `rank_pattern` for which `re.match(r"(.*\.)?(KEY)$", name)`
holds. Here a key is a plain name wherever that hits nothing else (PEFT before 0.15 and some servers
look names up literally), and `^` with an escaped name elsewhere. Keys from a file are never run as
regular expressions: literal names, escaped names and the prefixes `^`, `.*` and `.*\.` are compared
as text in linear time, anything else is refused.

Source: peft/utils/other.py, `get_pattern_key` (0.21.2).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from lora_inject.errors import FormatError

T = TypeVar("T", bound=Hashable)

_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")
_SPECIAL = frozenset("\\^$*+?{}[]|()")


@dataclass(frozen=True)
class NamePattern:
    """One key, ready to compare.

    Attributes:
        characters: The characters to match in order; None stands for any one character.
        anchor: `start` (the whole name), `dot` (the whole name or its end after a dot), `inside`
            (its end after a dot) or `end` (any end of the name).
    """

    characters: tuple[str | None, ...]
    anchor: str

    def hits(self, name: str) -> bool:
        """Whether PEFT would take this key for the site `name`.

        Example:
            >>> compile_key("lin").hits("block.lin"), compile_key("lin").hits("blin")
            (True, False)
        """
        start = len(name) - len(self.characters)
        if start < 0 or (start > 0 and self.anchor == "start"):
            return False
        if start == 0 and self.anchor == "inside":
            return False
        if start > 0 and self.anchor in {"dot", "inside"} and name[start - 1] != ".":
            return False
        pairs = zip(self.characters, name[start:], strict=True)
        return all(wanted is None or wanted == character for wanted, character in pairs)


def compile_key(key: str, asked: str = "pattern") -> NamePattern:
    r"""Read one key of a pattern table.

    Args:
        key: A literal name, an escaped one, or either after `^`, `.*\.`, `.*` or `(.*\.)?`.
        asked: The file, for messages.

    Returns:
        What to compare with.

    Raises:
        FormatError: The key is another regular expression.

    Example:
        >>> compile_key(r"^model\.q").hits("model.q"), compile_key(r"^model\.q").hits("x.model.q")
        (True, False)
    """
    rest, anchor = key, "dot"
    for prefix, meaning in (
        ("^", "start"),
        (r"(.*\.)?", "dot"),
        (r".*\.", "inside"),
        (".*", "end"),
    ):
        if rest.startswith(prefix):
            rest, anchor = rest.removeprefix(prefix), meaning
            break
    if rest.endswith("$") and not rest.endswith(r"\$"):
        rest = rest[:-1]
    return NamePattern(_characters(rest, key, asked), anchor)


def _characters(text: str, key: str, asked: str) -> tuple[str | None, ...]:
    """Literal and escaped characters, and `.` as any one; everything else is refused."""
    characters: list[str | None] = []
    position = 0
    while position < len(text):
        character = text[position]
        if character == "\\" and position + 1 < len(text) and not text[position + 1].isalnum():
            position += 1
            characters.append(text[position])
        elif character in _SPECIAL:
            raise FormatError(
                asked,
                f"the key {key[:80]!r} is a regular expression, and none from a file is ever run",
                "Write full module names in rank_pattern and alpha_pattern instead",
            )
        else:
            characters.append(None if character == "." else character)
        position += 1
    return tuple(characters)


def lookup(table: Iterable[tuple[NamePattern, T]], name: str, default: T) -> T:
    """The value of the first pattern that hits `name`, as PEFT would take it.

    Example:
        >>> table = [(compile_key("q"), 4), (compile_key("v"), 8)]
        >>> lookup(table, "layer.v", 16), lookup(table, "layer.k", 16)
        (8, 16)
    """
    return next((value for pattern, value in table if pattern.hits(name)), default)


def common(values: Iterable[T]) -> T | None:
    """The most frequent value, the first of them on a tie; None where there are none."""
    ranked = Counter(values).most_common(1)
    return ranked[0][0] if ranked else None


def pattern_keys(values: Mapping[str, T], default: T | None) -> dict[str, T]:
    r"""Return the pattern table that gives each site its value and hits nothing else wrongly.

    Args:
        values: Value by full site name, all sites.
        default: The value that needs no key.

    Returns:
        Key to value, sorted by key; the order does not matter, no two keys disagree about a site.

    Example:
        >>> pattern_keys({"lin": 4, "block.lin": 8, "q": 8}, default=8)
        {'^lin': 4}
        >>> pattern_keys({"block.lin": 4, "q": 8}, default=8)
        {'block.lin': 4}
    """
    unequal = _ambiguous(values)
    keys = {}
    for name, value in values.items():
        if value != default:
            literal = bool(_PLAIN.fullmatch(name)) and name not in unequal
            keys[name if literal else "^" + re.escape(name)] = value
    return dict(sorted(keys.items()))


def _ambiguous(values: Mapping[str, T]) -> set[str]:
    """Names that, taken as a key, would also hit a site with another value.

    A key's dots match any character and a key matches any end of a name after a dot. Names whose
    dots are at the same places are looked up in one table of ends with those places blanked, since
    comparing each of n names with each would take minutes for the experts of a large model.
    """
    by_dots: dict[tuple[int, ...], list[str]] = {}
    for name in values:
        dots = (len(name), *(i for i, character in enumerate(name) if character == "."))
        by_dots.setdefault(dots, []).append(name)
    ambiguous: set[str] = set()
    for places, keys in by_dots.items():
        length, dots = places[0], places[1:]
        hit: dict[str, set[T]] = {}
        for name, value in values.items():
            if len(name) == length or (len(name) > length and name[-length - 1] == "."):
                hit.setdefault(_blanked(name[len(name) - length :], dots), set()).add(value)
        ambiguous.update(key for key in keys if len(hit[_blanked(key, dots)]) > 1)
    return ambiguous


def _blanked(text: str, places: Iterable[int]) -> str:
    characters = list(text)
    for place in places:
        characters[place] = "."
    return "".join(characters)
