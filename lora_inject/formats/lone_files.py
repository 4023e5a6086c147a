"""One file of an adapter that is a folder, given without the rest."""

from __future__ import annotations

from pathlib import Path

from lora_inject.errors import FormatError


def lone_file(format: str, path: Path, file: str, config: str, holds: str) -> FormatError:  # noqa: A002
    """Return the error of one file of a folder, which says what to do.

    `file` and `config` are the names that the two have there, `holds` is what the config holds.
    """
    problem = f"it is one file of an adapter whose format, '{format}', is a folder"
    if path.name == file and (path.parent / config).is_file():
        return FormatError("", problem, f"Give the folder: '{path.parent}'")
    remedy = f"Fetch the {config} that belongs to it, which holds {holds}, put the two into one "
    remedy += f"folder, as {file} and {config}, and give the folder"
    return FormatError("", problem, remedy)
