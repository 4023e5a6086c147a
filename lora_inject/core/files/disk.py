"""Bytes on disk: read at an offset, write durably, rename.

No caller depends on a file position, so threads can share a descriptor.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
from pathlib import Path

from lora_inject.errors import CheckpointError

CAN_REPLACE_OPEN_FILES = os.name != "nt"
"""Whether a file that is open can be replaced, renamed and removed."""
POSITION = threading.Lock()  # of files, where reading or writing at an offset moves it
_PIECE = 1 << 24  # bytes: what is read at a time where that needs memory of its own
_REMEDIES = {
    errno.ENOSPC: "Free some space and run again",
    errno.EDQUOT: "Your quota is used up; free some space and run again",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Give a folder that you may write to"),
    errno.EROFS: "Give a folder on a disk that is not read-only",
}


def read_at(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from `fd`, beginning at byte `offset`."""
    done, n_bytes = 0, len(buffer)
    while done < n_bytes:
        n = _read_some(fd, buffer[done:], offset + done)
        if n == 0:
            problem = f"the file ends after {done} of them"
            remedy = "It was truncated while it was being read; restore it and run again"
            raise CheckpointError(f"read {n_bytes} bytes at {offset}", problem, remedy)
        done += n


def _read_some(fd: int, buffer: memoryview, offset: int) -> int:
    """Read some bytes, at least one unless the file ends, and return how many."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    with POSITION:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, min(len(buffer), _PIECE))
    buffer[: len(data)] = data
    return len(data)


def open_to_read(path: str | os.PathLike[str]) -> int:
    """Return a descriptor of a file, whose bytes are read as they are."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def rename_folder(source: Path, target: Path) -> None:
    """Rename a folder to a name that is free, or that of an empty folder."""
    try:
        source.rename(target)
    except FileExistsError:  # Windows renames over nothing
        target.rmdir()
        source.rename(target)


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
