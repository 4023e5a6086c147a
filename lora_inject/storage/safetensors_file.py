"""The header of a safetensors file: parsed as if it came from an enemy, built byte by byte.

A file is its header, and the header is a table of `(name, dtype, shape, start, stop)`.
With absolute byte positions at hand, a tensor can be read in row blocks and overwritten in place,
which the reference library offers no way to do. Format: 8 bytes little-endian length N, N bytes of
JSON, then the tensors end to end (https://github.com/huggingface/safetensors, README "Format").
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from lora_inject.errors import CheckpointError
from lora_inject.storage.disk import open_read, read_at

MAX_HEADER_BYTES = 100_000_000
"""The reference implementation's limit on N."""
MAX_NAME_LENGTH = 1024
MAX_DIMENSIONS = 16
MAX_DIMENSION = 1 << 48

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
"""Bits an element takes, by the format's dtype name."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        name: Its key.
        dtype: The format's name of its dtype, such as `BF16`.
        shape: Its dimensions.
        start: First byte, counted from the beginning of the file.
        stop: First byte after it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def n_bytes(self) -> int:
        """Bytes it takes."""
        return self.stop - self.start

    @property
    def n_elements(self) -> int:
        """Product of its dimensions."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The header of one file, checked.

    Attributes:
        raw: Length and JSON, byte for byte as in the file.
        tensors: Name to entry, in the order of the data.
        metadata: The `__metadata__` strings, None where there are none.
        size_bytes: Size of the whole file.
    """

    raw: bytes
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] | None
    size_bytes: int

    @property
    def digest(self) -> str:
        """SHA-256 of `raw`, in hexadecimal."""
        return hashlib.sha256(self.raw).hexdigest()


def parse_json(data: bytes, asked: str) -> Any:
    """Parse JSON that refuses duplicate keys and never raises anything but `CheckpointError`.

    Args:
        data: UTF-8 text.
        asked: What is being read, for the message.

    Raises:
        CheckpointError: Not JSON, nested too deeply, or a key occurs twice.

    Example:
        >>> parse_json(b'{"a": 1}', "an example")
        {'a': 1}
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise CheckpointError(
            asked, "its JSON is nested too deeply", "The file is damaged or hostile"
        ) from None
    except ValueError as error:
        raise CheckpointError(
            asked, f"it is not valid JSON ({error})", "The file is damaged; fetch it again"
        ) from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return table


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        path: The file.

    Raises:
        CheckpointError: Anything that the format forbids: see the messages below.
    """
    asked = f"read '{path.name}'"
    fd = open_read(path)
    try:
        size = os.fstat(fd).st_size
        if size < 8:
            raise _damaged(asked, f"it has {size} bytes, too few for a header")
        length_bytes = memoryview(bytearray(8))
        read_at(fd, length_bytes, 0)
        (length,) = struct.unpack("<Q", length_bytes)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise _damaged(
                asked, f"its header claims {length} bytes of {size}, at most {MAX_HEADER_BYTES}"
            )
        raw = bytearray(8 + length)
        read_at(fd, memoryview(raw), 0)
    finally:
        os.close(fd)
    return parse_header(bytes(raw), size, asked)


def parse_header(raw: bytes, size_bytes: int, asked: str) -> Header:
    """Check a header against the size of its file.

    Args:
        raw: The length and the JSON.
        size_bytes: Size of the whole file.
        asked: What is being read, for messages.

    Raises:
        CheckpointError: The table is malformed, or its tensors do not tile the file exactly.
    """
    table = parse_json(raw[8:], asked)
    if not isinstance(table, dict):
        raise _damaged(asked, "its header is not a JSON object")
    metadata = table.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    ):
        raise _damaged(asked, "__metadata__ is not a table of strings")
    entries = [_entry(asked, name, entry, len(raw)) for name, entry in table.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    position = len(raw)
    for entry in entries:
        if entry.start != position:
            raise _damaged(asked, f"'{entry.name}' begins at {entry.start}, not at {position}")
        position = entry.stop
    if position != size_bytes:
        raise _damaged(asked, f"its tensors end at byte {position} of {size_bytes}")
    return Header(raw, {entry.name: entry for entry in entries}, metadata, size_bytes)


def _entry(asked: str, name: str, entry: object, data_start: int) -> TensorEntry:
    shown = name[:80]
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise _damaged(asked, f"the tensor name {shown!r} is too long or not printable")
    if not isinstance(entry, dict):
        raise _damaged(asked, f"the entry of {shown!r} is not an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(asked, f"{shown!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS or max(shape, default=0) > MAX_DIMENSION:
        raise _damaged(asked, f"{shown!r} has the impossible shape {str(shape)[:80]}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(asked, f"{shown!r} has the impossible offsets {str(offsets)[:80]}")
    n_bits, start, stop = math.prod(shape) * DTYPE_BITS[dtype], offsets[0], offsets[1]
    if n_bits != 8 * (stop - start):
        raise _damaged(
            asked, f"{shown!r} is {dtype} {list(shape)}, which does not take {stop - start} bytes"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + start, data_start + stop)


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _damaged(asked: str, found: str) -> CheckpointError:
    return CheckpointError(asked, found, "The file is damaged; fetch it again")


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> Header:
    """Lay tensors end to end and build the header that says so.

    Args:
        tensors: `(name, dtype, shape)` in the order of the data.
        metadata: Strings to keep as `__metadata__`.

    Returns:
        The header; its length is padded with spaces to a multiple of 8, as the format's own
        writer does, so that the data begins aligned.

    Example:
        >>> header = build_header([("w", "BF16", (2, 3)), ("b", "F32", (3,))], {"format": "pt"})
        >>> header.tensors["b"].start - len(header.raw), header.size_bytes - len(header.raw)
        (12, 24)
    """
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position, rows = 0, []
    for name, dtype, shape in tensors:
        stop = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        rows.append((name, dtype, shape, position, stop))
        position = stop
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    raw = struct.pack("<Q", len(text)) + text
    base = len(raw)
    entries = {
        name: TensorEntry(name, dtype, shape, base + start, base + stop)
        for name, dtype, shape, start, stop in rows
    }
    return Header(raw, entries, metadata, base + position)
