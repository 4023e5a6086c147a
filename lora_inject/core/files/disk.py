"""Files that are written durably and atomically: under a temporary name, flushed, renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def fsync_dir(folder: Path) -> None:
    """Make the names in a folder durable, if the folder may be read."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_new(path: Path, data: bytes) -> None:
    """Create a new file and wait until it is on the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def temporary_name(target: Path) -> Path:
    """Return a free name in the target's own folder, so that it can be renamed to the target."""
    return target.with_name(f".{target.name[:30]}.{secrets.token_hex(6)}.tmp")


def replace_file(path: Path, data: bytes) -> None:
    """Write a file atomically and durably."""
    _put(path, data, Path.replace)


def create_file(path: Path, data: bytes) -> None:
    """Write a file atomically and durably; of several that do so at once, one succeeds.

    Raises:
        FileExistsError: Somebody has written it meanwhile.
    """
    _put(path, data, _link)


def _put(path: Path, data: bytes, name_it: Callable[[Path, Path], object]) -> None:
    temporary = temporary_name(path)
    try:
        write_new(temporary, data)
        name_it(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # no links there, as in FAT
        temporary.replace(path)
