"""Dotted names: their canonical form, their parts, what lies below, and how messages show them.

Everything is matched, shown and saved under one name, without the segments of wrappers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Segments of names that stand for no module of the user's: of torch's compiler, of FSDP1 and of
activation checkpointing."""


def canonical(name: str) -> str:
    """Return a dotted name without the segments that wrappers put into it.

    Examples:
        >>> canonical("_orig_mod.layers.0._checkpoint_wrapped_module.q_proj")
        'layers.0.q_proj'
    """
    if "_orig_mod" in name or "_wrapped_module" in name:
        return ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)
    return name


def parent(name: str) -> str:
    """Return the name of the module around a name, empty at the top."""
    return name.rpartition(".")[0]


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


def is_bias(name: str) -> bool:
    """Return whether a parameter is a bias by its name: `bias` or `..._bias`."""
    last = leaf(name)
    return last == "bias" or last.endswith("_bias")


def first_number(name: str) -> int | None:
    """Return the first number among the segments of a name: its layer.

    Examples:
        >>> first_number("model.layers.3.experts.0.up"), first_number("lm_head")
        (3, None)
    """
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


# ------------------------------------------------------------------------------------ what is below


def around(names: Iterable[str]) -> list[str]:
    """Return the modules around names, the innermost first, each once."""
    around_them: dict[str, None] = {}
    for name in names:
        module = parent(name)
        while module and module not in around_them:
            around_them[module] = None
            module = parent(module)
    return list(around_them)


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


# ------------------------------------------------------------------------------------- in messages


def counted(n: int, noun: str) -> str:
    """Return a number and a noun: `1 site`, `2,000 sites`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def quoted(names: Iterable[str]) -> str:
    """Return names in quotes, with commas between."""
    return ", ".join(f"'{name}'" for name in names)


def nearest(word: str, words: Iterable[str], n: int = 3) -> list[str]:
    """Return up to `n` of `words` that are spelled most like a word, best first, possibly none.

    Below a likeness of 0.65 a suggestion misleads: 'corda' is not 'olora'.

    Examples:
        >>> nearest("v_prj", ["q_proj", "v_proj", "norm"], n=1)
        ['v_proj']
    """
    plain = word.replace("\\d+", "0").replace("\\", "").strip("^$()")
    return difflib.get_close_matches(plain, list(words), n=n, cutoff=0.65)


def nearest_names(pattern: str, names: Iterable[str]) -> list[str]:
    r"""Return up to three names with a run of segments that is spelled like a pattern.

    Ends come before inner runs; of names that differ in numbers only, the first.

    Examples:
        >>> nearest_names(r"attn\.(q|v)_prj", ["h.0.attn.q_proj", "h.1.attn.q_proj", "norm"])
        ['h.0.attn.q_proj']
    """
    plain = _as_name(pattern)
    width = plain.count(".") + 1
    distinct = {re.sub(r"\d+", "0", name): name for name in reversed(list(names))}
    runs = [(_runs_of(name, width), name) for name in reversed(distinct.values())]
    by_run: dict[str, str] = {}
    for first in (True, False):
        for spelled, name in runs:
            for run in spelled[:1] if first else spelled[1:]:
                by_run.setdefault(run, name)
    return list(dict.fromkeys(by_run[run] for run in nearest(plain, by_run)))


def _runs_of(name: str, width: int) -> list[str]:
    """Return all runs of so many segments of a name, the last first."""
    segments = name.split(".")
    starts = range(max(0, len(segments) - width), -1, -1)
    return [".".join(segments[start : start + width]) for start in starts]


def _as_name(pattern: str) -> str:
    r"""Return a name that a pattern might have meant: `^h\.\d+\.(q|v)_proj$` as `h.0.q_proj`."""
    text = re.sub(r"\\d[+*]?|\[0-9\][+*]?", "0", re.sub(r"\(\?[^)]*\)", "", pattern))
    text = re.sub(r"\[\^?(.)[^]]*\]", r"\1", re.sub(r"\.[+*]\??", "", text))
    text = re.sub(r"\(([^()|]*)(?:\|[^()]*)?\)", r"\1", text)
    return re.sub(r"\\[AbBZ]|[\\^$()+*?]|\{[^}]*\}|\|.*", "", text).strip(".")


def templates(names: Iterable[str]) -> dict[str, int]:
    """Return names with their numbers collapsed, and how many each stands for.

    Exact: a template is written only for names that all exist, so its count is the size of its
    runs' product.

    Examples:
        >>> templates(["h.0.q", "h.1.q", "h.0.v"])
        {'h.{0..1}.q': 2, 'h.0.v': 1}
    """
    groups = {tuple(name.split(".")): 1 for name in names}
    for at in reversed(range(max(map(len, groups), default=0))):
        groups = dict(_collapsed(groups, at))
    return {".".join(key): n for key, n in groups.items()}


def _collapsed(
    groups: dict[tuple[str, ...], int], at: int
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield names of which those are joined that differ in the number at one position only."""
    alike: dict[tuple[object, ...], list[tuple[str, ...]]] = {}
    for key, n in groups.items():
        is_number = at < len(key) and key[at].isdecimal() and key[at] == str(int(key[at]))
        rest = (key[:at], key[at + 1 :], n) if is_number else (key,)
        alike.setdefault(rest, []).append(key)
    for keys in alike.values():
        first, n = keys[0], groups[keys[0]]
        if len(keys) > 1:
            numbers = _spans(int(key[at]) for key in keys)
            first = (*first[:at], numbers, *first[at + 1 :])
        yield first, n * len(keys)


def _spans(numbers: Iterable[int]) -> str:
    """Return `0, 1, 2, 5` as `{0..2,5}`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return f"{{{','.join('..'.join(map(str, span)) for span in spans)}}}"
