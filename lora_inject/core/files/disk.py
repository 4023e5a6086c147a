"""Bytes on disk: read and write at an offset, copy in the kernel, reserve, make durable.

Each operation uses the best call of the platform and falls back if the system does not support it.
No caller depends on a file position, so threads can share a descriptor.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
from pathlib import Path

try:
    from fcntl import ioctl
except ImportError:  # Windows
    ioctl = None  # type: ignore[assignment]

from lora_inject.errors import CheckpointError

CAN_REPLACE_OPEN_FILES = os.name != "nt"
"""Whether a file that is open can be replaced, renamed and removed."""
_POSITION = threading.Lock()  # of files, where reading or writing at an offset moves it
_PIECE = 1 << 24  # bytes: what is read at a time where that needs memory of its own
_FICLONE = 0x40049409  # linux/fs.h: share the extents of a whole file (XFS, btrfs)
_NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
_CANNOT_COPY_IN_KERNEL = {*_NOT_SUPPORTED, errno.EXDEV, errno.EPERM, errno.EBADF}
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
    with _POSITION:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, min(len(buffer), _PIECE))
    buffer[: len(data)] = data
    return len(data)


def write_at(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` to `fd`, beginning at byte `offset`."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += _write_some(fd, view[done:], offset + done)


def _write_some(fd: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _POSITION:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def copy_range(
    source: int, target: int, source_offset: int, target_offset: int, n_bytes: int
) -> None:
    """Copy `n_bytes` between two descriptors, in the kernel if it can, else in memory."""
    done = 0
    while done < n_bytes:
        first, to = source_offset + done, target_offset + done
        n = _copy_some(source, target, n_bytes - done, first, to)
        if n == 0:
            rest = memoryview(bytearray(n_bytes - done))
            read_at(source, rest, first)
            write_at(target, rest, to)
            n = len(rest)
        done += n


def _copy_some(source: int, target: int, n_bytes: int, first: int, to: int) -> int:
    """Copy some bytes in the kernel; return 0 if it cannot, or if the file ends."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source, target, n_bytes, first, to)
    except OSError as error:
        if error.errno in _CANNOT_COPY_IN_KERNEL:
            return 0
        raise


def clone(source: Path, target: int) -> bool:
    """Make `target` share all of `source`'s extents; return False if this is not supported."""
    if ioctl is None:
        return False
    with source.open("rb") as file:
        try:
            ioctl(target, _FICLONE, file.fileno())
        except OSError:
            return False
    return True


def reserve_bytes(fd: int, n_bytes: int) -> None:
    """Give the file its full size, with its blocks reserved if the platform can.

    A full disk is then an `OSError` before anything is written.
    """
    if n_bytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, n_bytes)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
    os.ftruncate(fd, n_bytes)


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
