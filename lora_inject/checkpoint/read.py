"""Reading a tensor of a file in row blocks, with memory that does not depend on its size.

One buffer for each thread, filled by positioned reads. The file is not mapped: the pages
of a mapping count as the process's own memory, and would make it look as large as the checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lora_inject.checkpoint.output_files import READABLE
from lora_inject.storage.disk import open_read, read_at
from lora_inject.storage.safetensors_file import TensorEntry

BLOCK_ELEMENTS = 1 << 20
"""Elements read and written at a time.

2 MiB of a 16-bit weight: the kernel gives a longer write larger pages, and asks less for each."""


def rows_per_block(n_cols: int, n_blocks: int = 1) -> int:
    """Return how many rows make some blocks; at least one."""
    return max(1, n_blocks * BLOCK_ELEMENTS // max(1, n_cols))


class Room:
    """Memory for one block of rows, used again for the next.

    Fresh memory for each block would cost more in page faults than all of the arithmetic.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.data = memoryview(self._buffer)
        """The bytes of the last result of `rows`."""

    def rows(self, dtype: torch.dtype, n_rows: int, n_cols: int) -> Tensor:
        """Return the memory as `(n_rows, n_cols)`; it holds what it held before."""
        n_bytes = n_rows * n_cols * dtype.itemsize
        if len(self._buffer) < n_bytes:
            self._buffer = bytearray(n_bytes)
        self.data = memoryview(self._buffer)[:n_bytes]
        if not n_bytes:
            return torch.empty(n_rows, n_cols, dtype=dtype)
        return torch.frombuffer(self.data, dtype=dtype).view(n_rows, n_cols)


class RowReader:
    """Reads rows of tensors of one file into `room`, which it reuses.

    The file is a path, or a descriptor that the caller keeps open.
    """

    def __init__(self, file: Path | int) -> None:
        self._own = False
        self._fd = file if isinstance(file, int) else open_read(file)
        self._own = not isinstance(file, int)
        self.room = Room()

    def __enter__(self) -> RowReader:
        return self

    def __exit__(self, *error: object) -> None:
        if self._own:
            os.close(self._fd)
            self._own = False

    def __del__(self) -> None:
        self.__exit__()

    def rows(self, entry: TensorEntry, n_cols: int, start: int, stop: int) -> Tensor:
        """Return `(stop - start, n_cols)` rows of a tensor's matrix; valid until the next call.

        In the stored dtype, which must be one of `READABLE`.
        """
        dtype = READABLE[entry.dtype]
        rows = self.room.rows(dtype, stop - start, n_cols)
        at = entry.start + start * n_cols * dtype.itemsize
        read_at(self._fd, self.room.data, at)
        return rows

    def blocks(self, entry: TensorEntry, n_cols: int) -> Iterator[tuple[int, Tensor]]:
        """Yield `(first row, rows)` over a whole tensor."""
        n_rows = entry.n_elements // max(1, n_cols)
        step = rows_per_block(n_cols)
        for start in range(0, n_rows, step):
            yield start, self.rows(entry, n_cols, start, min(n_rows, start + step))
