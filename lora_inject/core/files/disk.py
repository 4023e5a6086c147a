"""Files that are written durably and atomically: under a temporary name, flushed, renamed."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

CAN_REPLACE_OPEN_FILES = os.name != "nt"
"""Whether a file that is open can be replaced, renamed and removed."""
_REMEDIES = {
    errno.ENOSPC: "Free some space and run again",
    errno.EDQUOT: "Your quota is used up; free some space and run again",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Give a folder that you may write to"),
    errno.EROFS: "Give a folder on a disk that is not read-only",
}


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
    temporary = temporary_name(path)
    try:
        write_new(temporary, data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


def create_file(path: Path, data: bytes) -> None:
    """Write a file atomically and durably; of several that do so at once, one succeeds.

    Raises:
        FileExistsError: Somebody has written it meanwhile.
    """
    temporary = temporary_name(path)
    try:
        write_new(temporary, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # no links there, as in FAT
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


def remedy_for(error: OSError) -> str:
    """Return what to do about an error of the system."""
    return _REMEDIES.get(error.errno or 0, "Check the disk and run again")
