"""The tensors of an adapter's safetensors file: read and written.

Unlike in the reference library, a duplicate tensor name is refused (the library takes the last
one), and equal values give equal bytes (the library's metadata is in random order). No file is
mapped: the pages of a mapping count as memory of the process, and truncating the file would kill
it. NaN is allowed here; merging refuses it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lora_inject.core.files.safetensors_file import (
    DTYPES,
    TensorEntry,
    build_header,
    check_dtypes,
    header_of,
    is_plain_name,
    read_header,
)
from lora_inject.errors import FormatError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def is_safetensors(path: Path) -> bool:
    """Return whether a path is a file whose name says that it is of safetensors."""
    return path.suffix == ".safetensors" and path.is_file()


def read_names(path: Path) -> tuple[list[str], dict[str, str]]:
    """Return the names of a file's tensors, in the order of the data, and its text metadata."""
    header = read_header(path, FormatError)
    return list(header.tensors), dict(header.metadata or {})


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: tensors by name, and the metadata."""
    path = Path(path)
    asked = f"read '{path}'"
    if not path.is_file():
        raise FormatError(asked, "there is no such file", "Check the path")
    with path.open("rb") as file:
        header = header_of(file, path, FormatError)
        check_dtypes(header.tensors, asked)
        # They follow the header and one another without a gap.
        tensors = {name: _values(file, entry, asked) for name, entry in header.tensors.items()}
    return tensors, dict(header.metadata or {})


def _values(file: BinaryIO, entry: TensorEntry, asked: str) -> Tensor:
    """Return the values of the file's next tensor in memory of their own."""
    dtype, content = DTYPES[entry.dtype], bytearray(entry.n_bytes)
    if not content:
        return torch.empty(entry.shape, dtype=dtype, device="cpu")
    if file.readinto(content) != len(content):  # type: ignore[attr-defined]
        raise FormatError(asked, "it was cut off while it was read", "Read the adapter again")
    return torch.frombuffer(content, dtype=dtype).view(entry.shape)


def bytes_of(tensor: Tensor) -> bytearray:
    """Return the bytes of a tensor's values in their order; without numpy."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    content = bytearray(len(flat))
    if content:
        torch.frombuffer(content, dtype=torch.uint8).copy_(flat)
    return content


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file; equal values give equal bytes.

    Tensors may have any strides and be on any device but meta; dtypes and names must be such as
    `read_tensors` accepts. Shared memory is written twice.
    """
    for name, tensor in tensors.items():
        asked = f"write tensor {name[:80]!r}"
        if tensor.is_meta:
            problem = "it is on the meta device and has no values"
            raise FormatError(asked, problem, "Load its values first")
        if not is_plain_name(name):
            problem = "the name is too long or has control characters"
            raise FormatError(asked, problem, "Rename the module")
        if tensor.dtype not in _NAMES:
            problem = f"its dtype is {tensor.dtype}"
            raise FormatError(asked, problem, "Convert it to a plain dtype first")
    # The widest elements first, as the library has them: then each tensor begins aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    rows = [(name, _NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in ordered]
    header = build_header(rows, dict(sorted(metadata.items())))
    return b"".join((header.raw, *(bytes_of(tensor) for _, tensor in ordered)))
