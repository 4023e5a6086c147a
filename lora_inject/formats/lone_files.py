"""One file of an adapter that is a folder, given without the rest."""

from __future__ import annotations

from pathlib import Path


def rest_of_folder(path: Path, file: str, config: str, holds: str) -> str:
    """Return what to do with one file of a folder.

    `file` and `config` are the names that the two have there, `holds` is what the config holds.
    """
    if path.name == file and (path.parent / config).is_file():
        return f"Give the folder: '{path.parent}'"
    remedy = f"Fetch the {config} that belongs to it, which holds {holds}, put the two into one "
    return f"{remedy}folder, as {file} and {config}, and give the folder"
