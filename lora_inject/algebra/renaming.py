"""Other names for the sites and tensors of an adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from lora_inject.errors import StateError, check_type

T = TypeVar("T")


def renaming(
    new: Mapping[str, str] | Callable[[str], str], names: Sequence[str]
) -> Callable[[str], str]:
    """Return the change of a name; it refuses names that no module can be saved and loaded under.

    `new` is as in `lora_inject.rename`; each of its regexes must occur in one of `names`.
    """
    if callable(new):
        change = new
    else:
        check_type("rename", new, Mapping, "Give a dict, such as {'old': 'new'}, or a function")
        change = _substitution(new, names)

    def checked(name: str) -> str:
        made = change(name)
        if made != name and not re.fullmatch(r"[^\s./\\]+(\.[^\s./\\]+)*", made):
            remedy = "Give segments joined by dots, without spaces and slashes"
            raise StateError(f"rename '{name}'", f"its new name would be {made!r}", remedy)
        return made

    return checked


def _rule(old: str, text: str) -> re.Pattern[str]:
    """Compile the regex of whole segments."""
    for part in (old, text):
        check_type(f"rename {old!r}", part, str, "Give the new name as text")
    try:
        return re.compile(rf"(?<![^.])(?:{old})(?![^.])")
    except re.error as error:
        remedy = "Escape literal characters with a backslash"
        raise StateError(f"rename {old!r}", f"it is not a regex ({error})", remedy) from None


def _substitution(new: Mapping[str, str], names: Sequence[str]) -> Callable[[str], str]:
    """Return the function that replaces segments of a name, checked on all names."""
    rules = {old: _rule(old, text) for old, text in new.items()}
    used = set()

    def change(name: str) -> str:
        made: list[str] = []  # what one rule has made, which no other changes

        def put(match: re.Match[str], old: str) -> str:
            made.append(match.expand(new[old]))
            return f"\0{len(made) - 1}\0" if made[-1] else ""

        for old, rule in rules.items():
            try:
                changed, n = rule.subn(partial(put, old=old), name)
            except (re.error, IndexError) as error:
                problem, remedy = f"{new[old]!r} does not fit it ({error})", "Write \\1 for a group"
                raise StateError(f"rename {old!r}", problem, remedy) from None
            if n:
                name = re.sub(r"\.{2,}", ".", changed).strip(".")
                used.add(old)
        while re.search(r"\0\d+\0", name):
            name = re.sub(r"\0(\d+)\0", lambda place: made[int(place[1])], name)
        return name

    for name in names:
        change(name)
    if unused := [old for old in new if old not in used]:
        remedy = f"Give whole segments of names such as {some_of(names)}"
        raise StateError(f"rename {unused[0]!r}", "it occurs in no name of the adapter", remedy)
    return change


def some_of(names: Iterable[str]) -> str:
    """Return the first three names, for a message."""
    return ", ".join(repr(name) for name, _ in zip(names, range(3), strict=False)) or "none"


def distinct(items: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Return a mapping; two values under one name are an error."""
    renamed: dict[str, T] = {}
    for name, value in items:
        if name in renamed:
            remedy = "Give each its own name"
            raise StateError(f"the name '{name}'", "two tensors would have it", remedy)
        renamed[name] = value
    return renamed
