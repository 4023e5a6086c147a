"""Formats from outside the package."""

from __future__ import annotations

from lora_inject.core.adapter.exchange import FORMATS, Format, every_format
from lora_inject.errors import FormatError


def register_format(name: str, row: Format) -> Format:
    """Add a format from outside the package; detection tries it before the built-in ones.

    Args:
        name: The name for `format=`.
        row: Its functions.

    Returns:
        The row.

    Raises:
        FormatError: The name is taken.

    Examples:
        >>> import pickle
        >>> def write(state, path, facts):
        ...     return pickle.dumps(state)
        >>> def read(path, facts):
        ...     return pickle.loads(path.read_bytes())
        >>> row = register_format("pickle", Format(write, read, lambda path: path.suffix == ".x"))
        >>> FORMATS.pop("pickle") is row
        True
    """
    if name in every_format():
        raise FormatError(f"register_format({name!r})", "the name is taken", "Choose another one")
    others = dict(FORMATS)
    FORMATS.clear()
    FORMATS.update({name: row, **others})
    return row
