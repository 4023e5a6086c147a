"""Rows of the tensors of a safetensors file.

Memory does not depend on the size of a tensor: each thread has one buffer, filled by positioned
reads. The file is not mapped: the pages of a mapping count as memory of the process.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lora_inject.core.files.safetensors_file import DTYPES, TensorEntry
from lora_inject.errors import CheckpointError

BLOCK_ELEMENTS = 1 << 19
"""Elements read and written at a time.

1 MiB of a 16-bit weight: shorter writes cost more in the kernel, longer ones only memory."""


def rows_per_block(n_cols: int) -> int:
    """Return how many rows make a block; at least one."""
    return max(1, BLOCK_ELEMENTS // max(1, n_cols))


class Room:
    """Memory for one block of rows, reused for the next.

    New memory for each block costs more in page faults than the arithmetic.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.data = memoryview(self._buffer)
        """The bytes of the last result of `rows`."""

    def rows(self, dtype: torch.dtype, n_rows: int, n_cols: int) -> Tensor:
        """Return the memory as `(n_rows, n_cols)`, with its previous contents."""
        n_bytes = n_rows * n_cols * dtype.itemsize
        if len(self._buffer) < n_bytes:
            self._buffer = bytearray(n_bytes)
        self.data = memoryview(self._buffer)[:n_bytes]
        if not n_bytes:
            return torch.empty(n_rows, n_cols, dtype=dtype, device="cpu")
        return torch.frombuffer(self.data, dtype=dtype).view(n_rows, n_cols)


class RowReader:
    """Reads rows of tensors of one file, each thread into one buffer that it reuses.

    The file is open while the reader exists.
    """

    def __init__(self, path: Path) -> None:
        self._of_thread = threading.local()
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.close = weakref.finalize(self, os.close, self.fd)

    def rows(
        self, entry: TensorEntry, n_cols: int, start: int, stop: int, room: Room | None = None
    ) -> Tensor:
        """Return `(stop - start, n_cols)` rows of a tensor's matrix.

        They are in `room`; without one they are valid until the next call of the same thread.
        """
        dtype = DTYPES[entry.dtype]
        room = room or self._of_thread.__dict__.setdefault("room", Room())
        rows = room.rows(dtype, stop - start, n_cols)
        read_at(self.fd, room.data, entry.start + start * n_cols * dtype.itemsize)
        return rows

    def bytes(self, start: int, n_bytes: int) -> memoryview:
        """Return some bytes of the file; valid until the next call of the same thread."""
        room: Room = self._of_thread.__dict__.setdefault("room", Room())
        room.rows(torch.uint8, 1, n_bytes)
        read_at(self.fd, room.data, start)
        return room.data

    def whole(self, entry: TensorEntry) -> Tensor:
        """Return a whole tensor of its own shape; valid until the next call."""
        return self.rows(entry, 1, 0, entry.n_elements).view(entry.shape)

    def blocks(self, entry: TensorEntry, n_cols: int) -> Iterator[tuple[int, Tensor]]:
        """Yield `(first row, rows)` over a whole tensor."""
        n_rows, step = entry.n_elements // max(1, n_cols), rows_per_block(n_cols)
        for first in range(0, n_rows, step):
            yield first, self.rows(entry, n_cols, first, min(n_rows, first + step))


_POSITION = threading.Lock()  # of files, where reading or writing at an offset moves it
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
    with _POSITION:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, min(len(buffer), _PIECE))
    buffer[: len(data)] = data
    return len(data)
