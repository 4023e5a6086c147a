"""The header of a safetensors file, parsed as untrusted input and built byte by byte.

Format: 8 bytes little-endian length N, N bytes of JSON, then the tensors end to end
(https://github.com/huggingface/safetensors, README "Format").
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import filterfalse
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

from lora_inject.core.files.strict_json import Index, misfit, parse_json
from lora_inject.errors import CheckpointError, FormatError, LoraInjectError, within

MAX_HEADER_BYTES = 100_000_000
"""The reference implementation's limit on N."""
MAX_NAME_LENGTH = 1024
_CONTROL = "\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
"""Control characters, changes of direction, and halves of surrogate pairs."""
is_plain_name = re.compile(f"[^{_CONTROL}]{{,{MAX_NAME_LENGTH}}}").fullmatch
"""Whether a tensor may have a name: not too long, and without control characters."""
MAX_DIMENSIONS = 16
MAX_DIMENSION = 1 << 48

FLOATS: Mapping[str, torch.dtype] = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Dtypes that take an update, by the format's name."""

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    **FLOATS,
}
"""Dtypes whose values can be read, and that an adapter's file may hold."""

DTYPE_BITS: Mapping[str, int] = {
    **{name: 8 * dtype.itemsize for name, dtype in DTYPES.items()},
    **dict.fromkeys(("F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("U64", "C64"), 64),
    "F4": 4,
    "U16": 16,
    "U32": 32,
}
"""Bits an element takes, by the format's dtype name."""


_Shape = Annotated[
    list[Annotated[int, Field(ge=0, le=MAX_DIMENSION)]], Field(max_length=MAX_DIMENSIONS)
]


class _Entry(TypedDict):
    dtype: str
    shape: _Shape
    data_offsets: Annotated[list[Index], Field(min_length=2, max_length=2)]


_METADATA: TypeAdapter[Any] = TypeAdapter(dict[str, str] | None)
_TABLE: TypeAdapter[Any] = TypeAdapter(dict[str, _Entry])


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: the format's name of its dtype; bytes from the file's beginning."""

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
    """The header of one file, checked: `raw` is length and JSON, byte for byte as in the file.

    Tensors are in the order of the data. `size_bytes` is the size of the whole file.
    """

    raw: bytes
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] | None
    size_bytes: int


def read_header(path: Path, error: type[LoraInjectError] = CheckpointError) -> Header:
    """Read and check the header of a safetensors file.

    `error` is the class of errors: of a checkpoint, or `FormatError` for an adapter.
    """
    with path.open("rb") as file:
        return header_of(file, path, error)


def header_of(file: BinaryIO, path: Path, error: type[LoraInjectError]) -> Header:
    """Read and check the header of an open file; see `read_header`."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(8)
    length = int.from_bytes(start, "little")
    with within(f"read '{path}'"):
        if len(start) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            problem = f"it is cut off or not a safetensors file ({size} bytes)"
            raise error("", problem, _DAMAGED)
        return _parse_header(start + file.read(length), size, error)


_DAMAGED = "The file is damaged; fetch it again"


def _parse_header(raw: bytes, size_bytes: int, error: type[LoraInjectError]) -> Header:
    """Check that the table is well formed and that its tensors tile the file exactly."""
    table = parse_json(raw[8:], "its header", error, keys_once=True)
    if not isinstance(table, dict):
        raise error("", "its header is not a JSON object", _DAMAGED)
    metadata = table.pop("__metadata__", None)
    if misfit(metadata, _METADATA):
        raise error("", "its metadata is not a table of strings", _DAMAGED)
    if odd := next(filterfalse(is_plain_name, table), None):
        raise error("", f"the tensor name {odd[:80]!r} is too long or not printable", _DAMAGED)
    if wrong := misfit(table, _TABLE):
        raise error("", f"its header says what cannot be ({wrong})", _DAMAGED)
    entries = [_entry(name, entry, len(raw), error) for name, entry in table.items()]
    entries.sort(key=attrgetter("start", "stop"))
    position = len(raw)
    for entry in entries:
        if entry.start != position:
            raise error("", f"'{entry.name}' begins at {entry.start}, not at {position}", _DAMAGED)
        position = entry.stop
    if position != size_bytes:
        raise error("", f"its tensors end at byte {position} of {size_bytes}", _DAMAGED)
    return Header(raw, {entry.name: entry for entry in entries}, metadata, size_bytes)


def _entry(name: str, entry: Any, data_start: int, error: type[LoraInjectError]) -> TensorEntry:
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_BITS:
        raise error("", f"{name!r} has the unknown dtype {dtype[:40]!r}", _DAMAGED)
    if math.prod(shape) * DTYPE_BITS[dtype] != 8 * (stop - start):
        said = f"{name!r} is {dtype} {str(shape)[:80]}"
        raise error("", f"{said}, which does not take {stop - start} bytes", _DAMAGED)
    return TensorEntry(name, dtype, tuple(shape), data_start + start, data_start + stop)


def check_dtypes(entries: Mapping[str, TensorEntry], asked: str) -> None:
    """Refuse a file with tensors that no adapter has."""
    for dtype in sorted({entry.dtype for entry in entries.values()} - DTYPES.keys()):
        problem = f"no adapter's tensor has the dtype {dtype}"
        raise FormatError(asked, problem, "Give the adapter's file, not the base's")


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> Header:
    """Build the header of tensors `(name, dtype, shape)` that are stored end to end.

    Its length is padded with spaces to a multiple of 8, as the reference library does, so the data
    begins aligned.
    """
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position, rows = 0, []
    for name, dtype, shape in tensors:
        start, position = position, position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, position]}
        rows.append((name, dtype, shape, start, position))
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    raw = struct.pack("<Q", len(text)) + text
    entries = {row[0]: TensorEntry(*row[:3], *(len(raw) + at for at in row[3:])) for row in rows}
    return Header(raw, entries, metadata, len(raw) + position)
