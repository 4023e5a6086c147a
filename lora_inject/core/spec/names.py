"""Dotted names: their canonical form, their parts, what lies below, and how messages show them.

Everything is matched, shown and saved under one name, without the segments of wrappers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

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


def show(value: object) -> str:
    """Return a value as the user would recognize it, short and printable."""
    text = f"'{value}'" if isinstance(value, str) else repr(value)
    return printable(text if len(text) <= 60 else f"{text[:57]}...")


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


def nearest(word: str, words: Iterable[str], n: int = 3) -> list[str]:
    r"""Return up to `n` of `words` that end in what is spelled most like a word or a pattern.

    Best first, possibly none: below a likeness of 0.65 a suggestion misleads ('corda' is not
    'olora'). Of names that differ in numbers or in case only, the first.

    Examples:
        >>> nearest(r"attn\.(q|v)_prj", ["h.0.attn.q_proj", "h.1.attn.q_proj", "norm"])
        ['h.0.attn.q_proj']
    """
    plain = re.sub(r"\\d[+*]?|\[0-9\][+*]?", "0", word)
    plain = re.sub(r"\(([^()|]*)(?:\|[^()]*)?\)", r"\1", re.sub(r"\.[+*]\??", "", plain))
    plain = re.sub(r"[\\^$()+*?]", "", plain).strip(".").lower()
    ends: dict[str, str] = {}
    for name in words:
        end = name.split(".")[-1 - plain.count(".") :]
        ends.setdefault(re.sub(r"\d+", "0", ".".join(end)).lower(), name)
    close = [ends[end] for end in difflib.get_close_matches(plain, ends, n, cutoff=0.65)]
    if close or "." not in plain:
        return close
    # Where a segment is missing the last one tells, if it is misspelled itself.
    last = leaf(plain)
    return nearest(last, [name for name in ends.values() if leaf(name).lower() != last], n)


def meant(word: str, words: Iterable[str]) -> str:
    """Return a question with the word that is nearest, or all words."""
    known = list(words)
    near = nearest(word, known, n=1)
    return f"Did you mean '{near[0]}'?" if near else f"Write one of {', '.join(known)}"


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
        alike: dict[tuple[object, ...], list[tuple[str, ...]]] = {}
        for key, n in groups.items():
            is_number = at < len(key) and key[at].isdecimal() and key[at] == str(int(key[at]))
            rest = (key[:at], key[at + 1 :], n) if is_number else (key,)
            alike.setdefault(rest, []).append(key)
        joint = {}
        for keys in alike.values():
            first, n = keys[0], groups[keys[0]]
            if len(keys) > 1:
                numbers = _spans(int(key[at]) for key in keys)
                first = (*first[:at], numbers, *first[at + 1 :])
            joint[first] = n * len(keys)
        groups = joint
    return {".".join(key): n for key, n in groups.items()}


def _spans(numbers: Iterable[int]) -> str:
    """Return `0, 1, 2, 5` as `{0..2,5}`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return f"{{{','.join('..'.join(map(str, span)) for span in spans)}}}"
