"""A place and a value of a config, as messages show them."""

from __future__ import annotations

import errno
from typing import Any

Loc = tuple[str | int, ...]
"""The keys and indices from a config to a value inside."""


def show(value: Any) -> str:
    """Return the value as the user would recognize it, short and printable."""
    text = f"'{value}'" if isinstance(value, str) else repr(value)
    return printable(text if len(text) <= 60 else f"{text[:57]}...")


def dotted(path: Loc) -> str:
    """Return `("targets", 1, "rank")` as `targets[1].rank`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


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


def system_words(error: OSError) -> str:
    """Return what is wrong with a file or a folder.

    Examples:
        >>> system_words(IsADirectoryError(errno.EISDIR, "Is a directory", "runs"))
        'it is a folder'
    """
    words = {errno.ENOENT: "there is no such file", errno.EISDIR: "it is a folder"}
    return words.get(error.errno or 0) or error.strerror or str(error)
