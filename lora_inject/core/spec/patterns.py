"""Patterns: regexes for the ends of names, in the layers that a rule asks for.

A pattern means the names that it ends; an entry of `exclude`, `train` or of a verb's patterns also
what lies below.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from lora_inject.core.spec.names import around, nearest, parent, show
from lora_inject.core.spec.regexes import in_time
from lora_inject.errors import LoraInjectError, MatchError, StateError, check_list, check_type

INDEX = "(?:0|[1-9][0-9]{0,8})"  # no leading zeros: YAML reads 010 as 8, Python as 10


class Names:
    r"""Names of which many patterns are asked: what a plain one means is looked up.

    Examples:
        >>> names = Names(["a.q_proj", "a.my_q_proj", "a.q_proj.weight", "b.v_proj"])
        >>> names.matching("q_proj", "rule 1"), names.matching(r"b\..*", "rule 2")
        (['a.q_proj'], ['b.v_proj'])
        >>> names.below(["a.q_proj"])
        ['a.q_proj', 'a.q_proj.weight']
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(dict.fromkeys(names))
        # By a length, and where any character may be: ends of names, blanked there, to the names.
        self._ends: dict[tuple[int, tuple[int, ...]], dict[str, list[str]]] = {}

    def matching(
        self, pattern: str, asked: str, error: type[LoraInjectError] = MatchError
    ) -> list[str]:
        """Return the names that a pattern matches; `asked` is what messages call it."""
        if not _PLAIN.fullmatch(pattern):
            return in_time(pattern, self._names, asked, error)
        characters = [part.removeprefix("\\") or part for part in _PARTS.findall(pattern)]
        wild = tuple(n for n, part in enumerate(_PARTS.findall(pattern)) if part == ".")
        key = len(characters), wild
        if key not in self._ends:
            self._ends[key] = self._by_end(*key)
        return self._ends[key].get(_blanked("".join(characters), wild), [])

    def below(self, names: Iterable[str]) -> list[str]:
        """Return these and all that lies below them."""
        found: dict[str, None] = {}
        ahead = list(names)[::-1]
        while ahead:
            if (name := ahead.pop()) not in found:
                found[name] = None
                ahead += reversed(self._inside.get(name, ()))
        return list(found)

    @cached_property
    def _inside(self) -> dict[str, list[str]]:
        inside: dict[str, list[str]] = {}
        for name in filter(None, self._names):
            inside.setdefault(parent(name), []).append(name)
        return inside

    def _by_end(self, length: int, wild: tuple[int, ...]) -> dict[str, list[str]]:
        ends: dict[str, list[str]] = {}
        for name in self._names:
            if len(name) == length or name[-length - 1 : -length] == ".":
                end = name[-length:]
                if not any(end[n] == "\n" for n in wild):  # which `.` does not mean
                    ends.setdefault(_blanked(end, wild), []).append(name)
        return ends


_PLAIN = re.compile(r"(?:[\w-]|\\?\.|\\-)+")  # what means itself, and `.`
_PARTS = re.compile(r"\\?.")


def _blanked(text: str, wild: tuple[int, ...]) -> str:
    """Return a text with dots where any character may be."""
    for n in wild:
        text = f"{text[:n]}.{text[n + 1 :]}"
    return text


def named(
    names: Iterable[str],
    patterns: Iterable[str],
    asked: str,
    error: type[LoraInjectError] = StateError,
) -> dict[str, None]:
    """Return the names that patterns match, directly or by a module around; each must match."""
    names = list(names)
    chosen: set[str] = set()
    modules = [*names, *around(names)]
    known = Names(modules)
    for pattern in in_a_list(patterns, asked, error):
        matched = known.matching(pattern, f"{asked} {pattern!r}", error)
        if not matched:
            close = ", ".join(map(repr, nearest(pattern, modules))) or "none"
            raise error(f"{asked} {pattern!r}", "it matches nothing", f"Nearest: {close}")
        chosen.update(known.below(matched))
    return {name: None for name in names if name in chosen}


def in_a_list(
    patterns: Iterable[str], asked: str, error: type[LoraInjectError] = StateError
) -> Iterator[str]:
    """Yield the patterns of a list; a string by itself would be one pattern for each letter."""
    check_list(asked, patterns, "Give a list of patterns", error)
    for pattern in patterns:
        check_type(f"{asked}, a pattern", pattern, str, "Give a regex for the end of a name", error)
        yield pattern


# ------------------------------------------------------------------------------------------ layers


def layer_range(value: object) -> str:
    """Return a range as text, `4` or `16-31`; raise ValueError(found, remedy) for other values."""
    text = str(value) if type(value) is int else value
    match = re.fullmatch(rf"({INDEX})(?:-({INDEX}))?", text) if isinstance(text, str) else None
    if match is None or int(match[1]) > int(match[2] or match[1]):
        raise ValueError(f"{show(value)} is not a range of layers", "Write 16-31, or [0, 4, 8-11]")
    return match[0]


class Layers:
    """The layers of names: by the first number among their segments, in the list that it counts."""

    def __init__(self, names: Iterable[str]) -> None:
        self._of: dict[str, tuple[str, int]] = {}
        self._there: dict[str, set[int]] = {}
        for name in names:
            before: list[str] = []
            for segment in name.split("."):
                if segment.isdecimal():
                    self._of[name] = ".".join(before), int(segment)
                    self._there.setdefault(*self._of[name][:1], set()).add(int(segment))
                    break
                before.append(segment)

    def only(self, layers: Sequence[str], names: Sequence[str], label: str) -> list[str]:
        """Return the names in these layers; raise if there are none, or for layers that are not.

        What one rule matches need not be in each layer of the model.
        """
        ends = {text: [int(end) for end in text.split("-")] for text in layers}
        spans = {text: range(end[0], end[-1] + 1) for text, end in ends.items()}
        counted = [(name, self._of[name]) for name in names if name in self._of]
        kept = [name for name, (_, n) in counted if any(n in span for span in spans.values())]
        there = set[int]().union(*(self._there[of] for of in {of for _, (of, _) in counted}))
        missing = [text for text, span in spans.items() if not (kept and there.issuperset(span))]
        if not missing:
            return kept
        problem = f"it does not find all of layers {', '.join(missing)}"
        if not there:
            raise MatchError(label, problem, "Remove layers; no name that it matches has one")
        raise MatchError(label, problem, f"Its layers are {min(there)} to {max(there)}")
