"""Bytes on disk: read and write at an offset, copy in the kernel, reserve, lock, make durable.

Each operation names the best call that the platform has and falls back by what the
system answers, never by guessing which file system it is on. Nothing here knows what the bytes
mean, and nothing depends on a file position, so that several threads can share one descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_inject.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:  # everywhere else
    msvcrt = None  # type: ignore[assignment]

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
_SHARERS = 1024
"""How many processes may share a lock on Windows."""
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


def write_file(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all, and durable."""
    # The process id keeps two ranks that write the same file at once from sharing a temporary.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    fd = open_write(temporary)
    try:
        os.ftruncate(fd, 0)
        write_at(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)
    fsync_dir(path.parent)


@contextlib.contextmanager
def try_lock(fd: int, *, shared: bool = False) -> Iterator[bool]:
    """Hold a lock on an open file; yields False where another process holds it.

    The lock goes with the process, however it ends.
    """
    if fcntl is not None:
        mine = _taken(fcntl.flock, fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        release = functools.partial(fcntl.flock, fd, fcntl.LOCK_UN)
    else:
        start, n_bytes = _lock_bytes(fd, shared=shared)
        mine = n_bytes > 0
        release = functools.partial(_bytes_lock, fd, start, n_bytes, "LK_UNLCK")
    try:
        yield mine
    finally:
        if mine:
            release()


def _taken(lock: Callable[..., object], *arguments: object) -> bool:
    try:
        lock(*arguments)
    except OSError as error:
        if error.errno not in {errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}:
            raise
        return False
    return True


def _lock_bytes(fd: int, *, shared: bool) -> tuple[int, int]:
    """Lock as Windows can, which has no shared locks: each sharer takes one byte of many.

    Returns:
        Which bytes are locked, and how many: none where another process is in the way.
    """
    spans = [(k, 1) for k in range(_SHARERS)] if shared else [(0, _SHARERS)]
    for start, n_bytes in spans:
        if _taken(_bytes_lock, fd, start, n_bytes, "LK_NBLCK"):
            return start, n_bytes
    return 0, 0


def _bytes_lock(fd: int, start: int, n_bytes: int, how: str) -> None:
    os.lseek(fd, start, os.SEEK_SET)
    msvcrt.locking(fd, getattr(msvcrt, how), n_bytes)  # type: ignore[attr-defined,unused-ignore]
