"""The values of quantized tensors of a checkpoint, row by row, as their libraries dequantize them.

A `Packed` tensor is stored as several tensors. A checkpoint from `dequantized` shows it as one
float tensor with its plain name and shape, so that adapters are placed as on any base. Supported
are bitsandbytes' 4 and 8 bits, float8 with block scales, and the MXFP4 experts of GPT-OSS.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_inject.adapter.fingerprint import glimpse
from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.output_files import FLOATS, FORMAT_DTYPES
from lora_inject.checkpoint.quantized import (
    FLOAT8,
    FOUR_BIT,
    QUANT_STATE,
    method_of,
    quantization_of,
)
from lora_inject.checkpoint.read import RowReader
from lora_inject.errors import CheckpointError
from lora_inject.storage.safetensors_file import TensorEntry
from lora_inject.storage.strict_json import parse_json

Rows = Callable[[int, int], Tensor]
"""Function of `(start, stop)` to float32 rows `(stop - start, cols)` of a tensor's matrix."""


@dataclass(frozen=True)
class Packed(ABC):
    """A quantized tensor."""

    base: Checkpoint  # the checkpoint as it is stored
    shape: tuple[int, ...]  # its dimensions when dequantized
    parts: Mapping[str, TensorEntry]  # the stored tensors by role; `codes` is the largest

    @abstractmethod
    def rows(self) -> Rows:
        """Read the scales, and return the function that reads values; for one thread."""

    def packing(self) -> str:
        """Describe the format as `adapter.fingerprint.packing` does for a live model, or as ""."""
        return ""

    def _table(self, role: str) -> Tensor:
        """Return a small part in float32 and its own shape."""
        entry = self.parts[role]
        with self._reader(role) as reader:
            return reader.rows(entry, 1, 0, entry.n_elements).float().reshape(entry.shape)

    def _reader(self, role: str) -> RowReader:
        return RowReader(self.base.path_of(self.parts[role].name))

    def _bytes(self, role: str = "codes") -> Callable[[int, int], Tensor]:
        """Return the function that reads bytes of a part, each result valid until the next call."""
        entry, reader = replace(self.parts[role], dtype="U8"), self._reader(role)
        return lambda start, stop: reader.rows(entry, 1, start, stop).flatten()


@dataclass(frozen=True)
class Float8(Packed):
    """Float8 with one scale for every block: `W = q * s`."""

    block: tuple[int, int] = (128, 128)

    def rows(self) -> Rows:  # noqa: D102
        entry, reader, scales = self.parts["codes"], self._reader("codes"), self._table("scales")

        def read(start: int, stop: int) -> Tensor:
            values = reader.rows(entry, self.shape[1], start, stop)
            per_row = scales[torch.arange(start, stop) // self.block[0]]
            spread = per_row.repeat_interleave(self.block[1], dim=1)[:, : self.shape[1]]
            return values.float() * spread

        return read


@dataclass(frozen=True)
class Int8(Packed):
    """Int8 of bitsandbytes: `W = q * s / 127`, one scale for every row."""

    def rows(self) -> Rows:  # noqa: D102
        entry, reader, scales = self.parts["codes"], self._reader("codes"), self._table("scales")

        def read(start: int, stop: int) -> Tensor:
            values = reader.rows(entry, self.shape[1], start, stop)
            return values.float() * (scales.flatten()[start:stop] / 127)[:, None]

        return read

    def packing(self) -> str:  # noqa: D102
        codes = self._bytes()(0, self.parts["codes"].n_elements).view(torch.int8).view(self.shape)
        return f"Int8Params, {glimpse(codes)}"


@dataclass(frozen=True)
class FourBit(Packed):
    """4 bits of bitsandbytes: a table's value times the scale of its block; scales may be packed.

    Source: `bitsandbytes/functional.py`, QuantState and dequantize_4bit.
    """

    state: Mapping[str, Any]

    def rows(self) -> Rows:  # noqa: D102
        code, absmax, read_bytes = self._table("quant_map"), self._absmax(), self._bytes()
        block, n_cols, dtype = self.state["blocksize"], self.shape[1], FLOATS[self.state["dtype"]]

        def read(start: int, stop: int) -> Tensor:
            first, last = start * n_cols, stop * n_cols
            packed = read_bytes(first // 2, -(-last // 2)).int()
            codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[first % 2 :]
            values = code[codes[: last - first]] * absmax[torch.arange(first, last) // block]
            return values.to(dtype).float().view(-1, n_cols)

        return read

    def _absmax(self) -> Tensor:
        absmax = self._table("absmax").flatten()
        if "nested_absmax" not in self.parts:
            return absmax
        of_block = torch.arange(absmax.numel()) // self.state["nested_blocksize"]
        scales = self._table("nested_absmax").flatten()[of_block]
        offset: float = self.state["nested_offset"]
        return self._table("nested_quant_map")[absmax.long()] * scales + offset

    def packing(self) -> str:  # noqa: D102
        codes = self._bytes()(0, self.parts["codes"].n_bytes)
        state = f"{self.state['quant_type']}, blocks of {self.state['blocksize']}"
        return f"Params4bit, {state}, {self.shape}, {glimpse(codes)}"


@dataclass(frozen=True)
class Mxfp4(Packed):
    """MXFP4 experts: blocks of 32 4-bit values and a power of two; transposed when dequantized.

    Source: `transformers/integrations/mxfp4.py`, convert_moe_packed_tensors.
    """

    def rows(self) -> Rows:  # noqa: D102
        positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        code = torch.cat([positive, -positive])
        read_codes, read_scales = self._bytes(), self._bytes("scales")
        n_in, n_out = self.shape[1:]
        latest: dict[int, Tensor] = {}

        def expert(index: int) -> Tensor:
            if index not in latest:
                size = n_out * n_in // 2
                packed = read_codes(index * size, (index + 1) * size).int()
                codes = torch.stack([packed & 15, packed >> 4], dim=1).view(-1, 32)
                size = n_out * n_in // 32
                powers = read_scales(index * size, (index + 1) * size).int() - 127
                latest.clear()
                latest[index] = torch.ldexp(code[codes], powers[:, None]).view(n_out, n_in).t()
            return latest[index]

        def read(start: int, stop: int) -> Tensor:
            pieces = []
            for index in range(start // n_in, -(-stop // n_in)):
                first, last = max(start - index * n_in, 0), min(stop - index * n_in, n_in)
                pieces.append(expert(index)[first:last])
            return torch.cat(pieces)

        return read


def dequantized(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """Return a checkpoint that shows quantized tensors as float tensors of a dtype.

    Raises:
        CheckpointError: Nothing is quantized, or a tensor has an unsupported quantization.
    """
    packed = dict(_find(checkpoint))
    parts = {part.name for each in packed.values() for part in each.parts.values()}
    for entry in checkpoint:
        if entry.name not in parts and len(entry.shape) > 1:
            method = method_of(checkpoint, entry.name)
            _check(entry, method is None, f"its quantization, {method}, is not supported")
    if not packed:
        remedy = f"Leave it out, or write every float tensor so: dtype={dtype!r}"
        raise CheckpointError(
            f"dequantize '{checkpoint.folder}'", "none of its tensors is quantized", remedy
        )
    shown = {
        name: TensorEntry(name, FORMAT_DTYPES[dtype], each.shape, 0, 0)
        for name, each in packed.items()
    }
    return replace(checkpoint, packed=packed, shown=shown)


def _find(checkpoint: Checkpoint) -> Iterator[tuple[str, Packed]]:
    tensors, config = checkpoint.tensors, checkpoint.config
    said = quantization_of(config)
    for entry in checkpoint:
        name = entry.name
        near = {
            key.removeprefix(f"{name}."): tensors[key] for key in _neighbors(checkpoint, f"{name}.")
        }
        module = name.removesuffix("weight")
        scales = tensors.get(f"{name}_scale_inv")
        if state := [key for key in near if key.startswith(QUANT_STATE)]:
            yield name, _four_bit(checkpoint, entry, near, state[0])
        elif entry.dtype == "I8" and f"{module}SCB" in tensors and len(entry.shape) == 2:
            parts = {"codes": entry, "scales": tensors[f"{module}SCB"]}
            if (form := tensors.get(f"{module}weight_format")) is not None:
                parts["format"] = form
            _check(entry, parts["scales"].n_elements == entry.shape[0], "its scales do not fit")
            yield name, Int8(checkpoint, entry.shape, parts)
        elif entry.dtype in FLOAT8 and not name.endswith("_scale_inv"):
            fits = scales is not None and entry.dtype == "F8_E4M3" and len(entry.shape) == 2
            _check(entry, fits, "it is float8 without block scales")
            assert scales is not None
            yield name, _float8(checkpoint, entry, scales, said)
        elif name.endswith("_blocks") and said.get("quant_method") == "mxfp4":
            stem = name.removesuffix("_blocks")
            yield stem, _mxfp4(checkpoint, entry, tensors.get(f"{stem}_scales"))


def _neighbors(checkpoint: Checkpoint, prefix: str) -> list[str]:
    if not prefix.endswith("weight."):
        return []
    endings = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    names = [prefix + ending for ending in (*endings, *(QUANT_STATE + kind for kind in FOUR_BIT))]
    return [name for name in names if name in checkpoint.tensors]


def _four_bit(
    checkpoint: Checkpoint, entry: TensorEntry, near: Mapping[str, TensorEntry], key: str
) -> FourBit:
    parts = {"codes": entry, "state": near[key], **near}
    with RowReader(checkpoint.path_of(near[key].name)) as reader:
        text = bytes(reader.rows(near[key], 1, 0, near[key].n_elements).flatten().tolist())
    asked = f"read the quantization of '{entry.name}'"
    state = parse_json(text, asked, CheckpointError)
    good = isinstance(state, dict) and {"quant_map", "absmax"} <= near.keys()
    numbers = ("blocksize", *(("nested_blocksize",) if "nested_absmax" in near else ()))
    good = good and all(type(state.get(k)) is int and state[k] > 0 for k in numbers)
    shape = tuple(state.get("shape") or ()) if good else ()
    good = len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    good = good and state.get("dtype") in FORMAT_DTYPES
    _check(entry, good, f"its settings are {json.dumps(state)[:80]}")
    size = math.prod(shape)
    n_blocks = -(-size // state["blocksize"])
    counts = [entry.n_bytes * 2 in (size, size + 1), near["absmax"].n_elements == n_blocks]
    counts.append(near["quant_map"].n_elements == 16)
    if "nested_absmax" in near:
        n_nested = -(-n_blocks // state["nested_blocksize"])
        counts.append(near["nested_absmax"].n_elements == n_nested)
        counts.append(near.get("nested_quant_map", entry).n_elements == 256)
        counts.append(isinstance(state.get("nested_offset"), float))
    _check(entry, all(counts), "its parts do not fit each other")
    state = {**state, "dtype": FORMAT_DTYPES[state["dtype"]]}
    return FourBit(checkpoint, shape, parts, state)


def _float8(
    checkpoint: Checkpoint, entry: TensorEntry, scales: TensorEntry, said: Mapping[str, Any]
) -> Float8:
    block = said.get("weight_block_size", [128, 128])
    good = isinstance(block, list) and len(block) == 2
    if not good or not all(type(b) is int and b > 0 for b in block):
        found = f"config.json has the block size {str(block)[:40]}"
        raise CheckpointError("dequantize", found, "Give it two numbers")
    wanted = tuple(-(-size // b) for size, b in zip(entry.shape, block, strict=True))
    fits = scales.shape == wanted and scales.dtype in {"F32", "BF16", "F16"}
    _check(entry, fits, f"its scales are {scales.dtype} {list(scales.shape)}")
    parts = {"codes": entry, "scales": scales}
    return Float8(checkpoint, entry.shape, parts, (block[0], block[1]))


def _mxfp4(checkpoint: Checkpoint, entry: TensorEntry, scales: TensorEntry | None) -> Mxfp4:
    fits = len(entry.shape) == 4 and entry.shape[3] == 16 and entry.dtype == "U8"
    fits = fits and scales is not None and scales.shape == entry.shape[:3] and scales.dtype == "U8"
    _check(entry, fits, "its blocks or scales have another shape")
    assert scales is not None
    n_experts, n_out, n_groups, _ = entry.shape
    parts = {"codes": entry, "scales": scales}
    return Mxfp4(checkpoint, (n_experts, n_groups * 32, n_out), parts)


def _check(entry: TensorEntry, fits: bool, found: str) -> None:
    if not fits:
        raise CheckpointError(
            f"dequantize '{entry.name}'",
            found,
            "Supported: 4 and 8 bits of bitsandbytes, float8 (e4m3) with block scales, and MXFP4; "
            "merge into the 16-bit checkpoint that it was made from",
        )
