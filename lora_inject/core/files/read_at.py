"""Bytes read at an offset.

No caller depends on a file position, so threads can share a descriptor.
"""

from __future__ import annotations

import os
import threading

from lora_inject.errors import CheckpointError

CAN_REPLACE_OPEN_FILES = os.name != "nt"
"""Whether a file that is open can be replaced, renamed and removed."""
POSITION = threading.Lock()  # of files, where reading or writing at an offset moves it
_PIECE = 1 << 24  # bytes: what is read at a time where that needs memory of its own


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
