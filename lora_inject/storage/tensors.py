"""Safetensors files, read strictly and written whole.

The header is parsed here once, under limits and with duplicate names refused (the
library takes the last of two), before the library itself loads a tensor and checks the rest.

Source: https://github.com/huggingface/safetensors, README, "Format": eight bytes of length, a JSON
header, the data. What is not here: what the tensors mean. NaN is allowed; merging refuses it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lora_inject.errors import FormatError
from lora_inject.storage.mapped import Mapped, asked_for

MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 32_000_000
_STEP_BYTES = 1 << 20

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Dtypes that an adapter's file may hold, by the format's name."""


def parse_json(text: str | bytes, asked: str) -> Any:
    """Parse JSON from a file that is not trusted.

    Args:
        text: The JSON.
        asked: What it is, for the message.

    Returns:
        Plain data.

    Raises:
        FormatError: It is not JSON, too long or deep, holds NaN or Infinity, or a key twice.

    Example:
        >>> parse_json('{"r": 8}', "adapter_config.json")
        {'r': 8}
    """
    if len(text) > MAX_JSON_BYTES:
        raise FormatError(
            asked, f"it has more than {MAX_JSON_BYTES:,} bytes", "This is no adapter's file"
        )
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise FormatError(asked, f"it is not valid JSON ({error})", _DAMAGED) from error


_DAMAGED = "The file is damaged or was edited; fetch it again"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"key '{twice}' appears twice")
    return found


def _no_constants(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def read_header(path: Path) -> tuple[list[str], dict[str, str]]:
    """Read what a safetensors file holds, without its tensors, and check the header's outline.

    Args:
        path: The file.

    Returns:
        Names of the tensors, and the text metadata (empty where there is none).

    Raises:
        FormatError: The header is too long, cut off, not JSON, or names a tensor twice.
    """
    header, metadata, _ = _read_header(path)
    return list(header), metadata


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """The entries of the tensors, the metadata, and where the data begins."""
    asked = f"read '{path}'"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise FormatError(asked, "it is cut off or is no safetensors file", _DAMAGED)
        header = _parse_header(file.read(length), asked)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(asked, "its metadata holds something that is not text", _DAMAGED)
    return header, metadata, 8 + length


def _parse_header(text: bytes, asked: str) -> dict[str, Any]:
    """The header as a dict. Its own limit is that of the format, larger than for other JSON."""
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise FormatError(asked, f"its header is not valid ({error})", _DAMAGED) from error
    if not isinstance(header, dict):
        raise FormatError(asked, "its header is not a table of tensors", _DAMAGED)
    return header


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a whole safetensors file: into memory or, within `left_on_disk`, as a mapping.

    Args:
        path: The file.

    Returns:
        Tensors by name, and the metadata.

    Raises:
        FormatError: There is no such file, or it does not follow the format exactly.
    """
    path = Path(path)
    asked = f"read '{path}'"
    if not path.is_file():
        raise FormatError(asked, "there is no such file", "Check the path")
    keeper = asked_for(path.stat().st_size)
    try:
        if keeper is not None:
            # No room for a copy: then it goes into memory, as without the wish.
            with contextlib.suppress(OSError), keeper.copied(path) as copy:
                return _map(copy, keeper)
        return _read(path)
    except (safetensors.SafetensorError, ValueError, RuntimeError) as error:
        raise FormatError(asked, f"it is not valid ({error})", _DAMAGED) from error


def _checked_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """The header, whose every entry the library has checked against the size of the file."""
    header, metadata, start = _read_header(path)
    with safetensors.safe_open(path, framework="pt"):
        pass
    unknown = sorted({entry["dtype"] for entry in header.values()} - _DTYPES.keys())
    if unknown:
        raise ValueError(f"no adapter's tensor has the dtype {unknown[0]}")
    return header, metadata, start


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor in memory of its own, which a mapping would be beside it for a while."""
    header, metadata, start = _checked_header(path)
    tensors, step = dict[str, Tensor](), bytearray(_STEP_BYTES)
    with path.open("rb") as file:
        file.seek(start)  # the library has seen that no byte lies between two tensors
        for dtype, run in _runs(header):
            sizes = [_n_bytes(entry) // dtype.itemsize for entry in run.values()]
            flat = torch.empty(sum(sizes), dtype=dtype)
            _fill(flat, file, step)
            # In one call: an adapter of thousands of sites has thousands of small tensors.
            parts = [flat] if len(run) == 1 else torch.ops.aten.split_with_sizes_copy(flat, sizes)
            for (name, entry), part in zip(run.items(), parts, strict=True):
                tensors[name] = part.view(*entry["shape"]) if entry["shape"] else part.view(())
    return {name: tensors[name] for name in header}, metadata


def _runs(header: Mapping[str, Any]) -> Iterator[tuple[torch.dtype, dict[str, Any]]]:
    """Yield neighbours of one dtype that fit into one step together, and larger tensors alone."""
    run: dict[str, Any] = {}
    dtype, room = "", 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        n_bytes = _n_bytes(entry)
        if run and (entry["dtype"] != dtype or n_bytes > room):
            yield _DTYPES[dtype], run
            run = {}
        if not run:
            dtype, room = entry["dtype"], _STEP_BYTES
        run[name] = entry
        room -= n_bytes
    if run:
        yield _DTYPES[dtype], run


def _n_bytes(entry: Mapping[str, Any]) -> int:
    first, last = entry["data_offsets"]
    return int(last - first)


def _view(content: Any, entry: dict[str, Any], offset: int) -> Tensor:
    """A tensor over the bytes of a buffer, one element or more."""
    dtype, (first, last) = _DTYPES[entry["dtype"]], entry["data_offsets"]
    count = (last - first) // dtype.itemsize
    return torch.frombuffer(content, dtype=dtype, count=count, offset=offset).view(entry["shape"])


def _fill(tensor: Tensor, file: BinaryIO, step: bytearray) -> None:
    """Read a contiguous tensor's bytes from where the file is."""
    flat = tensor.reshape(-1).view(torch.uint8)
    for begin in range(0, flat.numel(), len(step)):
        part = flat[begin : begin + len(step)]
        n_bytes = file.readinto(memoryview(step)[: part.numel()])  # type: ignore[attr-defined]
        if n_bytes != part.numel():
            raise ValueError("it was cut while it was read")
        part.copy_(torch.frombuffer(step, dtype=torch.uint8, count=n_bytes))


def _map(path: Path, keeper: Mapped) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor as a view of one mapping."""
    header, metadata, start = _checked_header(path)
    content, tensors = keeper.map(path), {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if first == last:
            tensors[name] = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
        else:
            tensors[name] = _view(content, entry, start + first)
    return tensors, metadata


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file.

    Args:
        tensors: By name; shared or strided memory is copied.
        metadata: Text by name.

    Returns:
        The file's content, the same bytes for the same values.

    Raises:
        FormatError: A tensor is on the meta device.

    Example:
        >>> content = serialise({"a": torch.zeros(2)}, {"format": "pt"})
        >>> int.from_bytes(content[:8], "little") % 8
        0
    """
    unreal = [name for name, tensor in tensors.items() if tensor.is_meta]
    if unreal:
        raise FormatError(
            f"write tensor '{unreal[0]}'", "it is on the meta device and has no values", "Load it"
        )
    plain = {
        name: tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        for name, tensor in tensors.items()
    }
    content = safetensors.torch.save(plain, dict(metadata))
    # The library writes the metadata in the order of a hash table, another one each time.
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[start:]))
