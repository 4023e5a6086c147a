"""Bytes on disk: read and write at an offset, copy in the kernel, reserve, make durable.

Each operation names the best call that the platform has and falls back by what the
system answers, never by guessing which file system it is on. Nothing here knows what the bytes
mean, and nothing depends on a file position, so that several threads can share one descriptor.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

from lora_inject.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

COPY_STEP_BYTES = 32 << 20
"""Longest single copy: bounds the time until progress is reported and Ctrl-C is noticed."""

_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_FICLONE = 0x40049409  # linux/fs.h: share the extents of a whole file (XFS, btrfs)
_CANNOT_COPY_IN_KERNEL = {
    errno.EXDEV,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.EPERM,
    errno.EBADF,
}
_position_lock = threading.Lock()  # for platforms whose reads and writes move a file position


def open_read(path: Path) -> int:
    """Open a regular file for reading and return its descriptor."""
    return os.open(path, os.O_RDONLY | _BINARY)


def open_write(path: Path) -> int:
    """Create or open a file for writing and return its descriptor; the mode follows the umask."""
    return os.open(path, os.O_RDWR | os.O_CREAT | _BINARY, 0o666)


def read_at(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from `fd`, beginning at byte `offset`.

    Raises:
        CheckpointError: The file ends before the buffer is full.
    """
    done, n_bytes = 0, len(buffer)
    while done < n_bytes:
        n = _read_some(fd, buffer[done:], offset + done)
        if n == 0:
            raise CheckpointError(
                f"read {n_bytes} bytes at {offset}",
                f"the file ends after {done} of them",
                "It was cut while it was being read; restore it and run again",
            )
        done += n


def write_at(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` to `fd`, beginning at byte `offset`."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += _write_some(fd, view[done:], offset + done)


def _read_some(fd: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    with _position_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        chunk = os.read(fd, len(buffer))
    buffer[: len(chunk)] = chunk
    return len(chunk)


def _write_some(fd: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, view, offset)
    with _position_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, view)


def copy_range(
    source: int,
    target: int,
    source_offset: int,
    target_offset: int,
    n_bytes: int,
    copied: Callable[[int], None] | None = None,
) -> None:
    """Copy `n_bytes` between two files, in the kernel where it can.

    Args:
        source: Descriptor to read.
        target: Descriptor to write.
        source_offset: First byte to read.
        target_offset: First byte to write.
        n_bytes: How many.
        copied: Called with the number of bytes after every step.

    Raises:
        CheckpointError: The source ends early.
    """
    done = _copy_in_kernel(source, target, source_offset, target_offset, n_bytes, copied)
    buffer = memoryview(bytearray(min(n_bytes - done, 4 << 20)))
    while done < n_bytes:
        step = buffer[: min(len(buffer), n_bytes - done)]
        read_at(source, step, source_offset + done)
        write_at(target, step, target_offset + done)
        done += len(step)
        if copied is not None:
            copied(len(step))


def _copy_in_kernel(
    source: int,
    target: int,
    source_offset: int,
    target_offset: int,
    n_bytes: int,
    copied: Callable[[int], None] | None,
) -> int:
    """Copy as much as the kernel will and return how much that was."""
    if not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    while done < n_bytes:
        step = min(COPY_STEP_BYTES, n_bytes - done)
        try:
            n = os.copy_file_range(source, target, step, source_offset + done, target_offset + done)
        except OSError as error:
            if error.errno in _CANNOT_COPY_IN_KERNEL:
                return done
            raise
        if n == 0:  # end of file, or a file system that answers so: reading will tell which
            return done
        done += n
        if copied is not None:
            copied(n)
    return done


def clone(source: int, target: int) -> bool:
    """Make `target` share all of `source`'s extents, copy on write; False where not supported."""
    if fcntl is None or not hasattr(os, "copy_file_range"):
        return False
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def reserve(fd: int, n_bytes: int) -> None:
    """Give the file its full size, with its blocks set aside where the platform can.

    Raises:
        OSError: ENOSPC before anything was written.
    """
    os.ftruncate(fd, 0)
    if n_bytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, n_bytes)
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
                raise
        else:
            return
    os.ftruncate(fd, n_bytes)


def fsync_dir(folder: Path) -> None:
    """Make the names in a folder durable; a no-op where folders cannot be opened (Windows)."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_new(path: Path, data: bytes) -> None:
    """Create a file that must be new (mode 0666 less the umask) and wait until it is on disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def temporary_name(target: Path) -> Path:
    """Return a free name in the target's own folder: a rename never crosses file systems there."""
    return target.with_name(f".{target.name[:30]}.{secrets.token_hex(6)}.tmp")


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, durable, so that it is there whole or not at all."""
    temporary = temporary_name(path)
    try:
        write_new(temporary, data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)
