"""Names of an adapter's tensors in files: those that are due, and names for messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lora_inject.errors import FormatError


def one_line(names: Iterable[str], n: int = 3) -> str:
    """The first few names for a message, and how many more there are.

    Examples:
        >>> one_line(["a", "b", "c", "d", "e"])
        "'a', 'b', 'c' and 2 more"
    """
    listed = list(names)
    shown = ", ".join(f"'{name[:200]}'" for name in listed[:n])
    return shown if len(listed) <= n else f"{shown} and {len(listed) - n} more"


def check_keys(keys: Iterable[str], due: Iterable[str]) -> None:
    """Refuse a file whose tensors are not exactly the expected ones."""
    keys, due = set(keys), set(due)
    parts = [f"it lacks {one_line(sorted(due - keys))}"] if due - keys else []
    if keys - due:
        parts.append(f"it holds {one_line(sorted(keys - due))}, which nothing accounts for")
    if parts:
        raise FormatError("", "; ".join(parts), "The file is incomplete or was edited")


def check_no_clash(keys: Iterable[str]) -> None:
    """Refuse two tensors with the same name."""
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        problem = f"two tensors would be called {one_line(twice)}"
        raise FormatError("", problem, 'Use format="native"')
