"""Tensors whose values stay in their file until they are used."""

from __future__ import annotations

import os
import re
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.files.row_reader import CAN_REPLACE_OPEN_FILES, RowReader, open_to_read
from lora_inject.core.files.safetensors_file import (
    DTYPES,
    TensorEntry,
    check_dtypes,
    header_of,
)
from lora_inject.errors import CheckpointError, FormatError
from lora_inject.trees import tree_leaves, tree_map_only

_WRITTEN = "the file was written to after it was opened", "Read the adapter again"


def left_on_disk(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file by name, and its metadata; see `read_tensors`."""
    file = _File(path)
    header = file.header
    check_dtypes(header.tensors, f"read '{path}'")
    tensors: dict[str, Tensor] = {n: _TensorOnDisk.of(file, e) for n, e in header.tensors.items()}
    return tensors, dict(header.metadata or {})


_MOST_OPEN = 64 if CAN_REPLACE_OPEN_FILES else 0
_TICK_NS = 20_000_000  # the clock of a file system is not coarser on Linux
_OPEN: weakref.WeakSet[_File] = weakref.WeakSet()


class _File:
    """A file that stays open for the values that are read later, or all of its bytes.

    Hundreds of adapters would use up the descriptors of the process, and a file that was written
    to just now can be written to again without a change of its time: these are read at once, and
    all where an open file could not be replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.fd = path, open_to_read(path)
        close = weakref.finalize(self, os.close, self.fd)
        self._written, self._last = self._when(), threading.local()
        self._bytes: bytearray | None = None
        with open(self.fd, "rb", closefd=False) as file:
            self.header = header_of(file, path, FormatError)
            if len(_OPEN) < _MOST_OPEN and time.time_ns() - self._written[0] > _TICK_NS:
                _OPEN.add(self)
                return
            self._bytes = bytearray(self.header.size_bytes)
            file.seek(0)
            n = file.readinto(self._bytes)
        close()
        if n != len(self._bytes) or not self._bytes.startswith(self.header.raw):
            raise FormatError(f"read '{path}'", *_WRITTEN)

    def read(self, entry: TensorEntry) -> Tensor:
        """Return one tensor in memory of its own."""
        return self.elements(entry, 0, entry.n_elements).view(entry.shape)

    def elements(self, entry: TensorEntry, first: int, n: int) -> Tensor:
        """Return some elements of a tensor, `(n,)`."""
        dtype = DTYPES[entry.dtype]
        if self._bytes is not None:
            start = entry.start + first * dtype.itemsize
            return torch.frombuffer(self._bytes, dtype=dtype, count=n, offset=start).clone()
        try:
            values = RowReader(self.fd).rows(entry, 1, first, first + n).flatten()
            now = self._when()
        except CheckpointError as error:
            raise FormatError(f"read '{self.path}'", error.found, _WRITTEN[1]) from None
        except OSError as error:
            raise FormatError(f"read '{self.path}'", str(error), _WRITTEN[1]) from error
        if now != self._written:
            raise FormatError(f"read '{self.path}'", *_WRITTEN)
        return values

    def _when(self) -> tuple[int, int]:
        """Return what changes where the file is written again in place, as some programs do."""
        now = os.fstat(self.fd)
        return now.st_mtime_ns, now.st_size

    def last(self, entry: TensorEntry) -> Tensor:
        """Return one tensor, cached if this thread read it last.

        Experts with interleaved values are read one after the other.
        """
        if getattr(self._last, "entry", None) is not entry:
            self._last.entry, self._last.values = entry, self.read(entry)
        values: Tensor = self._last.values
        return values


_WITHOUT_VALUES = frozenset(
    {"__get__", "__getitem__", "__len__", "contiguous", "detach", "dim", "element_size", "expand"}
    | {"flatten", "is_contiguous", "is_floating_point", "numel", "permute", "reshape", "size"}
    | {"stride", "storage_offset", "t", "transpose", "unbind", "view"}
)
"""Methods, and all attributes, that need no values unless they copy."""
_CHANGES = re.compile(
    r"__set(item)?__|__i(add|and|div|mul|or|pow|sub|xor|\w+shift|\w+div)__|.*[^_]_"
    r"|data_ptr|.*storage"
)
"""Names of what changes its first argument, or needs the address of its values."""


class _TensorOnDisk(Tensor):
    """A tensor of a file. Its views are on disk as well, other results are ordinary tensors.

    Its own memory is on the meta device: the strides say which elements of the file it has.
    `__torch_dispatch__` would be shorter and makes torch import all of its distributed tensors.
    """

    device = torch.device("cpu")
    is_meta = False
    file: _File
    entry: TensorEntry

    @classmethod
    def of(cls, file: _File, entry: TensorEntry, place: Tensor | None = None) -> _TensorOnDisk:
        if place is None:
            place = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
        self = place.as_subclass(cls)
        self.file, self.entry = file, entry
        return self

    def read_from_disk(self) -> Tensor:
        """Return the values in memory of their own."""
        place = _plain(self)
        shape, strides, first = place.shape, place.stride(), int(place.storage_offset())
        numel, dtype = place.numel(), place.dtype
        n = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if not numel:
            return torch.empty(shape, dtype=dtype, device="cpu")
        if n > numel:
            return self.file.last(self.entry).as_strided(shape, strides, first).clone()
        return self.file.elements(self.entry, first, n).as_strided(shape, strides)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute without values what needs none, and read them for all else.

        1. An attribute needs none: the most frequent, so the shortest way.
        2. What would write into the tensor is refused.
        3. What gives views of it gives tensors on disk.
        4. All else gets the values, in memory.
        """
        kwargs, first, name = kwargs or {}, args[0] if args else None, func.__name__
        if name == "__get__":
            result = _run_plainly(func, (), args)
            if not isinstance(result, Tensor):
                return result
        _check_unchanged(name, first, kwargs)
        if isinstance(first, cls) and name in _WITHOUT_VALUES:
            result = _run_plainly(func, (), args, kwargs)
            views = tree_map_only(Tensor, lambda t: _view(first, t), result)
            if result is None or all(leaf is not None for leaf in tree_leaves(views)):
                return views
        args, kwargs = tree_map_only(cls, cls.read_from_disk, (args, kwargs))
        return func(*args, **kwargs)


def _check_unchanged(name: str, first: Any, kwargs: dict[str, Any]) -> None:
    """Raise for a function that would change a tensor on disk, by the function's name."""
    changed = first if _CHANGES.fullmatch(name) else None
    for target in tree_leaves((changed, kwargs.get("out"))):
        if isinstance(target, _TensorOnDisk):
            asked = f"{name} of a tensor of '{target.file.path}'"
            remedy = "Use a copy: tensor.clone(), or copy.deepcopy of the adapter"
            raise FormatError(asked, "its values are in the file", remedy)


def _view(of: _TensorOnDisk, made: Tensor) -> _TensorOnDisk | None:
    """Return a result as a tensor on disk; None if it is not a view of the tensor."""
    place, result = _plain(of), _plain(made)
    shared = result.untyped_storage() is place.untyped_storage()
    same = shared and result.dtype == place.dtype
    return _TensorOnDisk.of(of.file, of.entry, result) if same else None


# What a Parameter has as `__torch_function__` runs a function, past that of any subclass.
_run_plainly: Any = nn.Parameter.__torch_function__


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor, if it is one on disk, as the plain meta tensor that it is."""
    plain: Tensor = _run_plainly(Tensor.as_subclass, (), (tensor, Tensor))
    return plain


def in_memory(tensor: Tensor) -> Tensor:
    """Return a tensor itself, or the values of one that `read_tensors` left on disk."""
    read: Any = getattr(tensor, "read_from_disk", None)
    return tensor if read is None else read()


def contiguous(tensor: Tensor) -> Tensor:
    """Return a tensor with contiguous values; a tensor on disk is returned as it is."""
    return tensor if hasattr(tensor, "read_from_disk") else tensor.contiguous()
