"""Safetensors files, read strictly and written whole.

One idea: the header is parsed here once, under limits and with duplicate names refused (the
library takes the last of two), before the library itself loads a tensor and checks the rest.

Source: https://github.com/huggingface/safetensors, README, "Format": eight bytes of length, a JSON
header, the data. What is not here: what the tensors mean. NaN is allowed; merging refuses it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lora_inject.errors import FormatError

__all__ = ["parse_json", "read_header", "read_tensors", "serialise"]

MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 32_000_000


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
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key '{key}' appears twice")
        found[key] = value
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
    return list(header), metadata


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
    """Read a whole safetensors file into memory of its own.

    Args:
        path: The file.

    Returns:
        Tensors by name, and the metadata.

    Raises:
        FormatError: There is no such file, or it does not follow the format exactly.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"read '{path}'", "there is no such file", "Check the path")
    _, metadata = read_header(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            # clone: the file may be replaced or changed while its pages are still mapped.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, RuntimeError) as error:
        raise FormatError(f"read '{path}'", f"it is not valid ({error})", _DAMAGED) from error
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
