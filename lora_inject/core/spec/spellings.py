"""Names for messages: those that are spelled like a pattern, and many in one template."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_ALIKE = 0.65  # below this likeness a suggestion misleads: 'corda' is not 'olora'
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


def nearest(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """Return up to `n` of `names` that are spelled most like `name`, best first.

    Args:
        name: What the user wrote; regex punctuation is ignored.
        names: What there is.
        n: How many to return at most.

    Returns:
        The nearest spellings, possibly none.

    Examples:
        >>> nearest("v_prj", ["q_proj", "v_proj", "norm"], n=1)
        ['v_proj']
    """
    plain = name.replace("\\d+", "0").replace("\\", "").strip("^$()")
    return difflib.get_close_matches(plain, list(names), n=n, cutoff=_ALIKE)
