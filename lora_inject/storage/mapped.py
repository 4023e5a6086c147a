"""A large file's tensors left on disk: mapped from a private copy, read when they are used.

What merges on disk needs each tensor of an adapter once or twice and never all at a time.
So the file is copied, in the kernel, into a temporary file that has no name any more, and its
tensors are views of a mapping of that. Nobody can change or cut the copy while it is mapped, and
the memory of pages that were read is given back by `release`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import IO, BinaryIO

LEAST_BYTES = 8 << 20
"""Smaller files are read into memory."""

_asked: ContextVar[Mapped | None] = ContextVar("lora_inject.storage.mapped", default=None)


class Mapped:
    """The mappings that were made within one `left_on_disk`."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    @staticmethod
    @contextlib.contextmanager
    def copied(path: Path) -> Iterator[Path]:
        """Copy a file to a temporary one, which is there until the block ends."""
        with tempfile.NamedTemporaryFile(prefix="lora_inject-") as copy, path.open("rb") as file:
            _copy(file, copy)
            copy.flush()
            yield Path(copy.name)

    def map(self, path: Path) -> mmap.mmap:
        """Map a file; the mapping outlives its name."""
        with path.open("rb") as file:
            # Private and writable: torch warns of memory that it could not write.
            found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._maps.append(found)
        return found

    def release(self) -> None:
        """Give back the memory of what was read; it is read again where it is used again.

        What was written into the tensors would be lost; nothing that merges writes into them.
        """
        for found in self._maps:
            found.madvise(mmap.MADV_DONTNEED)


@contextlib.contextmanager
def left_on_disk() -> Iterator[Mapped]:
    """Have `read_tensors` leave large files on disk within the block, where the platform can."""
    mapped = Mapped()
    token = _asked.set(mapped)
    try:
        yield mapped
    finally:
        _asked.reset(token)


def asked_for(n_bytes: int) -> Mapped | None:
    """Return who keeps the mapping of a file of `n_bytes`, None where it is to be read."""
    able = hasattr(mmap, "MADV_DONTNEED") and os.name == "posix"
    return _asked.get() if able and n_bytes >= LEAST_BYTES else None


def _copy(file: BinaryIO, copy: IO[bytes]) -> None:
    """Copy a whole file, in the kernel where it can."""
    size, done = os.fstat(file.fileno()).st_size, 0
    try:
        while done < size:
            n = os.copy_file_range(file.fileno(), copy.fileno(), size - done, done, done)
            if n == 0:
                break
            done += n
    except (AttributeError, OSError):
        pass  # macOS has no such call, and some file systems refuse: read and write instead
    file.seek(done)
    copy.seek(done)
    shutil.copyfileobj(file, copy, 1 << 20)
