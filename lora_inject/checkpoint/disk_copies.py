"""Large files: write at an offset, copy in the kernel, reserve.

Each operation uses the best call of the platform and falls back if the system does not support it.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from lora_inject.core.files.row_reader import POSITION, read_at

try:
    from fcntl import ioctl
except ImportError:  # Windows
    ioctl = None  # type: ignore[assignment]

_FICLONE = 0x40049409  # linux/fs.h: share the extents of a whole file (XFS, btrfs)
_NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
_CANNOT_COPY_IN_KERNEL = {*_NOT_SUPPORTED, errno.EXDEV, errno.EPERM, errno.EBADF}


def write_at(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` to `fd`, beginning at byte `offset`."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += _write_some(fd, view[done:], offset + done)


def _write_some(fd: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with POSITION:
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
