"""Versions of an adapter, side by side in a folder, for servers that follow a training run."""

from __future__ import annotations

import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from lora_inject.core.files.atomic import replace_file
from lora_inject.errors import FormatError
from lora_inject.formats.format import Format

LATEST = "LATEST"
"""File with the name of an adapter's newest version."""


def folder_of(version: int, path: Path, format: str, row: Format, asked: str) -> Path:  # noqa: A002
    """Return where a version is written; `row` is that of its format, which must be a folder's."""
    if row.endings:
        problem = f"versions are folders, and {format!r} is one file"
        raise FormatError(f"{asked}, version {version}", problem, "Leave version out")
    return path / str(version)


def note_newest(folder: Path, newest: int, keep: int | None) -> None:
    """Note the version that was written last, and remove the oldest but `keep`."""
    replace_file(folder / LATEST, f"{newest}\n".encode())
    if keep is None:
        return
    versions = sorted(int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdecimal())
    for version in [v for v in versions if v != newest][: max(0, len(versions) - max(1, keep))]:
        # renamed first: nobody finds half of one
        doomed = folder / f".{version}.{secrets.token_hex(6)}.tmp"
        with suppress(FileNotFoundError):  # another process was first
            (folder / str(version)).rename(doomed)
            shutil.rmtree(doomed)
