"""Dotted names: their canonical form, patterns on their ends, and nearest spellings.

Everything is matched, shown and saved under one name, without the segments of wrappers.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable
from functools import lru_cache

import regex

from lora_inject.errors import LoraInjectError, MatchError, StateError, check_type, nearest

# Segments that wrappers put into names: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

MATCH_SECONDS = 5.0  # for one pattern and all names; a harmless pattern takes milliseconds

_NOT_A_REGEX = (re.error, OverflowError, RecursionError)


def canonical(name: str) -> str:
    """Return a dotted name without the segments that wrappers put into it.

    Examples:
        >>> canonical("_orig_mod.layers.0._checkpoint_wrapped_module.q_proj")
        'layers.0.q_proj'
    """
    if "_orig_mod" in name or "_wrapped_module" in name:
        return ".".join(segment for segment in name.split(".") if segment not in _WRAPPERS)
    return name


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
    try:
        compiled = _compiled(pattern)
    except (*_NOT_A_REGEX, regex.error) as problem:  # such as [a[:b], which only `re` reads
        raise error(asked, f"it is not a regex: {problem}", "Escape its brackets") from None
    end = time.process_time() + seconds  # the clock that `timeout` is counted on
    matched, name = [], ""
    try:
        for name in names:
            if compiled.match(name, timeout=max(end - time.process_time(), 1e-6)):
                matched.append(name)
    except TimeoutError:
        what = f"it took more than {seconds:g} s to match (on '{name[:60]}')"
        remedy = "Write the pattern without repetition inside repetition, such as (a+)+"
        raise error(asked, what, remedy) from None
    return matched


def regex_problem(pattern: str) -> str | None:
    """Return why a pattern is not a valid regex for names; None if it is one."""
    try:
        pattern.encode()  # half a surrogate pair is not text
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "possible nested set" and the like mean a mistake
            re.compile(pattern)
    except (*_NOT_A_REGEX, UnicodeError, Warning) as problem:
        return str(problem)
    return None


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> regex.Pattern[str]:
    """Compile a Python regex for a name's end; `regex` has the time limits.

    Everything inside the pattern keeps its meaning: alternations, a leading `^` (the name's start),
    inline flags, verbose mode, group numbers and names.
    """
    verbose = bool(re.compile(pattern).flags & re.VERBOSE)
    # Global inline flags may only stand first.
    space = r"\s*" if verbose else ""
    flags = re.match(rf"(?:\(\?[aiLmsux]+\){space})*", pattern)
    body = pattern[flags.end() :] if flags else pattern
    # To `re`, a brace that is not a count is text; to `regex`, it may ask for a fuzzy match.
    body = re.sub(r"(?<!\\)((?:\\\\)*)(?<!\\N)\{(?!\d+(?:,\d*)?\}|,\d*\})", r"\1\\{", body)
    # In verbose mode the line break ends a comment that would swallow the bracket.
    close = "\n)" if verbose else ")"
    return regex.compile(rf"{flags[0] if flags else ''}(?s:.*\.)?(?:{body}{close}\Z")


def parent(name: str) -> str:
    """Return the name of the module around a name, empty at the top."""
    return name.rpartition(".")[0]


def around(names: Iterable[str]) -> list[str]:
    """Return the modules around names, the innermost first, each once."""
    modules: dict[str, None] = {}
    for name in names:
        module = parent(name)
        while module and module not in modules:
            modules[module] = None
            module = parent(module)
    return list(modules)


def joined(path: str, key: str) -> str:
    """Return the name of what `path` holds under `key`; the root's name is empty.

    Examples:
        >>> joined("layers.0", "weight"), joined("", "weight")
        ('layers.0.weight', 'weight')
    """
    return f"{path}.{key}" if path else key


def leaf(name: str) -> str:
    """Return the last segment of a name."""
    return name.rpartition(".")[2]


def first_number(name: str) -> int | None:
    """Return the first number among the segments of a name: its layer.

    Examples:
        >>> first_number("model.layers.3.experts.0.up"), first_number("lm_head")
        (3, None)
    """
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


class Below:
    """Whether a name, or a module around it, is in a set; each module is looked up once."""

    def __init__(self, names: Iterable[str]) -> None:
        self._known = dict.fromkeys(names, True)
        self._known.setdefault("", False)

    def __contains__(self, name: str) -> bool:
        asked = []
        while (known := self._known.get(name)) is None:  # "" is always known
            asked.append(name)
            name = parent(name)
        self._known.update(dict.fromkeys(asked, known))
        return known


def is_bias(name: str) -> bool:
    """Return whether a parameter is a bias by its name: `bias` or `..._bias`."""
    last = leaf(name)
    return last == "bias" or last.endswith("_bias")


def counted(n: int, noun: str) -> str:
    """Return a number and a noun: `1 site`, `2,000 sites`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def quoted(names: Iterable[str]) -> str:
    """Return names in quotes, with commas between."""
    return ", ".join(f"'{name}'" for name in names)


# Nearest spellings --------------------------------------------------------------------------------

_MAX_SPELLINGS = 4000


def _plain(pattern: str) -> str:
    r"""A name that the pattern might have meant: `^h\.\d+\.(q|v)_proj$` as `h.0.q_proj`."""
    text = re.sub(r"\A(?:\(\?[aiLmsux]+\))+", "", pattern)
    text = re.sub(r"\(\?(?:[:=!>]|<[=!]|P<\w+>)", "(", text)
    text = re.sub(r"\\d[+*]?|\[0-9\][+*]?", "0", text)
    text = re.sub(r"\[\^?(.)[^]]*\]", r"\1", text)
    text = re.sub(r"\.[+*]\??", "", text)
    text = re.sub(r"\(([^()|]*)(?:\|[^()]*)?\)", r"\1", text)
    return re.sub(r"\\[AbBZ]|[\\^$()+*?]|\{[^}]*\}|\|.*", "", text).strip(".")


def nearest_names(pattern: str, names: Iterable[str]) -> list[str]:
    """Return up to three names with a run of segments that is similar to the pattern."""
    plain = _plain(pattern)
    width = plain.count(".") + 1
    distinct = {re.sub(r"\d+", "0", name): name for name in reversed(list(names))}
    ends: dict[str, str] = {}
    inner: dict[str, str] = {}
    for name in reversed(distinct.values()):  # the first of all that differ in numbers only
        segments = name.split(".")
        ends.setdefault(".".join(segments[-width:]), name)
        for start in range(max(0, len(segments) - width)):
            inner.setdefault(".".join(segments[start : start + width]), name)
        if len(ends) + len(inner) > _MAX_SPELLINGS:
            break
    spellings = {**ends, **inner, **ends}  # ends first, and their names before those of inner runs
    near = nearest(plain, spellings) if plain else []
    return list(dict.fromkeys(map(spellings.__getitem__, near)))


# Names that differ in numbers ---------------------------------------------------------------------


def _runs(numbers: Iterable[int]) -> str:
    """`0, 1, 2, 5` as `{0..2,5}`, a single number as itself."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    texts = ["..".join(map(str, run)) for run in runs]
    return texts[0] if len(runs) == len(runs[0]) == 1 else f"{{{','.join(texts)}}}"


def templates(names: Iterable[str]) -> dict[str, int]:
    """Names with their numbers collapsed, and how many each stands for.

    Exact: a template is written only for names that all exist, so its count is the size of its
    runs' product.

    Examples:
        >>> templates(["h.0.q", "h.1.q", "h.0.v"])
        {'h.{0..1}.q': 2, 'h.0.v': 1}
    """
    groups = {tuple(name.split(".")): 1 for name in names}
    depth = max(map(len, groups), default=0)
    for at in reversed(range(depth)):
        groups = _collapse(groups, at)
    return {".".join(key): n for key, n in groups.items()}


def _collapse(groups: dict[tuple[str, ...], int], at: int) -> dict[tuple[str, ...], int]:
    """Join names that differ in the number at one position only."""
    joined: dict[tuple[object, ...], tuple[tuple[str, ...], list[int], int]] = {}
    for key, n in groups.items():
        if at < len(key) and key[at].isdecimal() and key[at] == str(int(key[at])):
            bucket: tuple[object, ...] = (key[:at], key[at + 1 :], n)
            numbers = joined.setdefault(bucket, (key, [], n))[1]
            numbers.append(int(key[at]))
        else:
            joined[(key, None)] = (key, [], n)
    result = {}
    for key, numbers, n in joined.values():
        run = (_runs(numbers),) if numbers else key[at : at + 1]
        result[(*key[:at], *run, *key[at + 1 :])] = n * max(1, len(numbers))
    return result


def printable(text: str, keep: str = "") -> str:
    r"""Return text that a terminal and a page can show safely: other characters are escaped.

    Names come from untrusted files, and a terminal runs escape sequences. `keep` is not escaped.

    Examples:
        >>> printable("h.0\x1b[2J.q\n"), printable("a\n", keep="\n")
        ('h.0\\x1b[2J.q\\n', 'a\n')
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def named(
    names: Iterable[str],
    patterns: Iterable[str],
    asked: str,
    error: type[LoraInjectError] = StateError,
) -> dict[str, None]:
    """Return the names that patterns match, directly or by a parent; each pattern must match."""
    names = list(names)
    chosen: dict[str, None] = {}
    modules = [*names, *around(names)]
    for pattern in patterns:
        check_type(f"{asked}, a pattern", pattern, str, "Give a regex for the end of a name", error)
        below = Below(matching(pattern, modules, asked=f"{asked} {pattern!r}", error=error))
        hits = dict.fromkeys(name for name in names if name in below)
        if not hits:
            close = ", ".join(map(repr, nearest(pattern, modules))) or "none"
            raise error(f"{asked} {pattern!r}", "it matches nothing", f"Nearest: {close}")
        chosen |= hits
    return {name: None for name in names if name in chosen}
