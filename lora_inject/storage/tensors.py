"""The tensors of a safetensors file: all of them read, or a whole file written.

Unlike the reference library, a tensor name that occurs twice is refused (the library takes the last
of the two), and the same values give the same bytes (the library's metadata is in random order).
What the tensors mean is not known here. NaN is allowed; merging refuses it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_inject.errors import FormatError
from lora_inject.storage.safetensors_file import build_header, is_plain_name, read_header

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""Dtypes that an adapter's file may hold, and the format's names of them."""
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def read_names(path: Path) -> tuple[list[str], dict[str, str]]:
    """Read the names of a file's tensors and its text metadata, and check its header.

    Args:
        path: The file.

    Returns:
        Names in the order of the data, and the metadata (empty where there is none).

    Raises:
        FormatError: The file does not follow the format exactly.
    """
    header = read_header(path, FormatError)
    return list(header.tensors), dict(header.metadata or {})


def read_tensors(
    path: str | os.PathLike[str], *, on_disk: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a whole safetensors file.

    Args:
        path: The file.
        on_disk: Return views of the mapped file, which take no memory that the system cannot take
            back, and see what is written into the file; else each tensor has memory of its own.

    Returns:
        Tensors by name, and the metadata.

    Raises:
        FormatError: There is no such file, or it does not follow the format exactly.
    """
    path = Path(path)
    asked = f"read '{path}'"
    if not path.is_file():
        raise FormatError(asked, "there is no such file", "Check the path")
    header = read_header(path, FormatError)
    unknown = sorted({entry.dtype for entry in header.tensors.values()} - _DTYPES.keys())
    if unknown:
        found = f"no adapter's tensor has the dtype {unknown[0]}"
        raise FormatError(asked, found, "Give the adapter's file, not the base's")
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in header.tensors:
                view = file.get_tensor(name)
                tensors[name] = view if on_disk else view.clone()
    except (SafetensorError, OSError) as error:
        raise FormatError(asked, f"it cannot be read ({error})", "Fetch it again") from error
    return tensors, dict(header.metadata or {})


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file.

    Args:
        tensors: By name, of any strides and on any device but meta; shared memory is written twice.
        metadata: Text by name.

    Returns:
        The file's content, the same bytes for the same values.

    Raises:
        FormatError: A tensor is on the meta device, of a dtype that no adapter has, or has a name
            that a reader would refuse.

    Examples:
        >>> content = serialize({"a": torch.zeros(2)}, {"format": "pt"})
        >>> int.from_bytes(content[:8], "little") % 8
        0
    """
    for name, tensor in tensors.items():
        if tensor.is_meta:
            found = "it is on the meta device and has no values"
            raise FormatError(f"write tensor '{name}'", found, "Load its values first")
        if not is_plain_name(name):
            found = "the name is too long or has control characters"
            raise FormatError(f"write tensor {name[:80]!r}", found, "Rename the module")
        if tensor.dtype not in _NAMES:
            found = f"its dtype is {tensor.dtype}"
            raise FormatError(f"write tensor '{name}'", found, "Convert it to a plain dtype first")
    # The widest elements first, as the library has them: then each tensor begins aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    rows = [(name, _NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in ordered]
    header = build_header(rows, dict(sorted(metadata.items())))
    content = bytearray(header.size_bytes)
    content[: len(header.raw)] = header.raw
    for name, tensor in ordered:
        entry = header.tensors[name]
        if entry.n_bytes:
            flat = tensor.detach().contiguous().flatten().view(torch.uint8)
            place = torch.frombuffer(
                content, dtype=torch.uint8, count=len(flat), offset=entry.start
            )
            place.copy_(flat)
    return bytes(content)
