"""The formats of quantized tensors of a checkpoint: values read row by row, and encoded again.

A quantized tensor is stored as several tensors, its parts: codes, scales, tables. Supported are
bitsandbytes' 4 bits, float8 with scales, NVFP4, and the MXFP4 experts of GPT-OSS.
`quantized_base` finds them in the files.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_inject.core.adapter.fingerprint import glimpse
from lora_inject.core.files.row_reader import RowReader
from lora_inject.core.files.safetensors_file import DTYPES, FLOATS, TensorEntry
from lora_inject.errors import CheckpointError
from lora_inject.quantized.codes import float4_values, float8_values, mxfp4_values

MAX_FLOAT8 = 448.0  # of e4m3
MAX_FLOAT4 = 6.0  # of e2m1
NVFP4_GROUP = 16

Rows = Callable[[int, int], Tensor]
"""Function of `(start, stop)` to float32 rows `(stop - start, cols)` of a tensor's matrix."""
PartRows = Callable[[str, int, int, int], Tensor]
"""Function of `(role, n_cols, start, stop)` to rows of a part that is seen with so many columns."""


def rows_in_memory(parts: Mapping[str, Tensor]) -> PartRows:
    """Return the function to rows of parts that are given as tensors."""
    return lambda role, n_cols, start, stop: parts[role].reshape(-1, n_cols)[start:stop]


@dataclass(frozen=True)
class Packed(ABC):
    """A quantized tensor."""

    path_of: Callable[[str], Path]  # the file that a stored tensor is in
    shape: tuple[int, ...]  # its dimensions when dequantized
    parts: Mapping[str, TensorEntry]  # the stored tensors by role; `codes` is the largest

    title: ClassVar[str]  # what messages call the format

    @property
    def form(self) -> str:
        """The name of the format in reports."""
        return type(self).__name__.lower()

    def rows(self) -> Rows:
        """Return the function that reads values, each result valid until the next call."""
        readers = {e.name: RowReader(self.path_of(e.name)) for e in self.parts.values()}

        def rows_of_part(role: str, n_cols: int, start: int, stop: int) -> Tensor:
            entry = self.parts[role]
            return readers[entry.name].rows(entry, n_cols, start, stop)

        return partial(self.values, rows_of_part)

    @abstractmethod
    def values(self, part: PartRows, start: int, stop: int) -> Tensor:
        """Return rows of the matrix, float32, of its parts."""

    @property
    def written(self) -> Mapping[str, int]:
        """The parts that `encoded` makes: after how many values each begins with a new entry."""
        return {}

    @property
    def unit(self) -> int:
        """After how many rows all of these parts begin with a new entry."""
        n_values = math.lcm(*self.written.values())
        return n_values // math.gcd(n_values, self.shape[-1])

    def encoded(self, values: Tensor) -> dict[str, Tensor]:
        """Return the contents of parts for some rows of float32 values; they begin at a `unit`."""
        raise NotImplementedError(self.form)

    def packing(self) -> str:
        """Describe the format as `adapter.packing` does for a live model, or as ""."""
        return ""

    def part(self, role: str) -> Tensor:
        """Return a whole part."""
        entry = self.parts[role]
        return RowReader(self.path_of(entry.name)).whole(entry)


@dataclass(frozen=True)
class Float8(Packed):
    """Float8 with one scale for every block: `W = q * s`. A block may be a row, or all of W."""

    block: tuple[int, int]
    powers: bool  # whether the scales are powers of two
    title = "float8 with scales"

    def values(self, part: PartRows, start: int, stop: int) -> Tensor:  # noqa: D102
        (high, wide), n_cols = self.block, self.shape[1]
        first = start // high
        scales = part("scales", -(-n_cols // wide), first, -(-stop // high))
        of_rows = scales[torch.arange(start, stop, device="cpu") // high - first]
        codes = part("codes", n_cols, start, stop)
        return float8_values(codes, of_rows, (1, wide))

    @property
    def written(self) -> Mapping[str, int]:  # noqa: D102
        return {"codes": 1, "scales": self.block[0] * self.shape[1]}

    def encoded(self, values: Tensor) -> dict[str, Tensor]:  # noqa: D102
        (n_rows, n_cols), (high, wide) = values.shape, self.block
        padded = pad(values, (0, -n_cols % wide, 0, -n_rows % high))
        blocks = padded.view(-1, high, padded.shape[1] // wide, wide)
        most = MAX_FLOAT8
        scales = blocks.abs().amax(dim=(1, 3)) / most
        scales = scales.log2().ceil().exp2() if self.powers else scales
        scales = scales.to(DTYPES[self.parts["scales"].dtype])
        scaled = blocks / _divisor(scales.float())[:, None, :, None]
        codes = scaled.clamp(-most, most).to(torch.float8_e4m3fn)
        return {"codes": codes.view(padded.shape)[:n_rows, :n_cols].contiguous(), "scales": scales}


@dataclass(frozen=True)
class Nvfp4(Packed):
    """4 bits (e2m1), a float8 scale for each 16 of them, and a float32 scale for all.

    That of all is kept when the others are made anew. Sources: compressed_tensors, as
    `compressors/nvfp4` writes it; modelopt, `qtensor/nvfp4_tensor.py`.
    """

    divides: bool  # whether the scale of all divides the others
    title = "NVFP4"

    @property
    def written(self) -> Mapping[str, int]:  # noqa: D102
        return {"codes": 2, "scales": NVFP4_GROUP}

    def values(self, part: PartRows, start: int, stop: int) -> Tensor:  # noqa: D102
        n_in = self.shape[1]
        codes = float4_values(part("codes", n_in // 2, start, stop))
        steps = self._steps(part("scales", n_in // NVFP4_GROUP, start, stop))
        return (codes.view(*steps.shape, -1) * steps.unsqueeze(-1)).flatten(-2)

    def _steps(self, scales: Tensor) -> Tensor:
        """Return what the code 1 means in each group."""
        return scales.float() / self._whole if self.divides else scales.float() * self._whole

    @cached_property
    def _whole(self) -> Tensor:
        return self.part("whole").float()

    def encoded(self, values: Tensor) -> dict[str, Tensor]:
        """Return the contents of parts, each value the nearest that its group holds.

        Raises:
            CheckpointError: A value is further beyond all of them than they are from each other.
        """
        unit = self._steps(torch.ones(()))
        groups = values.view(len(values), -1, NVFP4_GROUP)
        largest = groups.abs().amax(dim=2)
        top = MAX_FLOAT8 * unit
        # The codes lie 2 apart at 6: one that is off by 1 is as good as the format's others.
        if bool((largest > (MAX_FLOAT4 + 1) * top).any()):
            name = self.parts["codes"].name
            problem = f"merged, it has values up to {float(largest.max()):.3g}; its scale of all "
            problem += f"groups holds up to {float(MAX_FLOAT4 * top):.3g}"
            remedy = "Write plain floats (--dequantize bfloat16)"
            raise CheckpointError(f"requantize '{name}'", problem, remedy)
        wanted = (largest / MAX_FLOAT4 / unit).clamp(max=MAX_FLOAT8)
        scales = wanted.to(torch.float8_e4m3fn)
        steps = _divisor(self._steps(scales))
        return {"codes": float4_codes(groups / steps[..., None]), "scales": scales}


@dataclass(frozen=True)
class FourBit(Packed):
    """4 bits of bitsandbytes: a table's value times its block's scale; scales may be packed.

    Source: `bitsandbytes/functional.py`, QuantState and dequantize_4bit.
    """

    state: Mapping[str, Any]
    title = "bitsandbytes 4-bit"

    @property
    def written(self) -> Mapping[str, int]:  # noqa: D102
        block, nested = self.state["blocksize"], self.state.get("nested_blocksize")
        parts = {"codes": 2, "absmax": block}
        return parts | ({"nested_absmax": block * nested} if self._nested else {})

    @property
    def form(self) -> str:  # noqa: D102
        return str(self.state["quant_type"])

    @property
    def _nested(self) -> bool:
        return "nested_absmax" in self.parts

    def values(self, part: PartRows, start: int, stop: int) -> Tensor:  # noqa: D102
        block, n_cols, dtype = self.state["blocksize"], self.shape[1], FLOATS[self.state["dtype"]]
        first, last = start * n_cols, stop * n_cols
        both = part("codes", 1, first // 2, -(-last // 2)).flatten().int()
        codes = torch.stack([both >> 4, both & 15], dim=1).flatten()[first % 2 :]
        scales = self._scales(part, first // block, -(-last // block))
        of_block = torch.arange(first, last, device="cpu") // block - first // block
        values = self._table[codes[: last - first]] * scales[of_block]
        return values.to(dtype).float().view(-1, n_cols)

    def _scales(self, part: PartRows, first: int, last: int) -> Tensor:
        """Return the scales of some blocks."""
        scales = part("absmax", 1, first, last).flatten()
        if not self._nested:
            return scales.float()
        size = self.state["nested_blocksize"]
        of_block = torch.arange(first, last, device="cpu") // size - first // size
        nested = part("nested_absmax", 1, first // size, -(-last // size)).float().flatten()
        values = self._nested_table[scales.long()] * nested[of_block]
        return values + float(self.state["nested_offset"])

    @cached_property
    def _table(self) -> Tensor:
        return self.part("quant_map").flatten().float()

    @cached_property
    def _nested_table(self) -> Tensor:
        return self.part("nested_quant_map").flatten().float()

    def encoded(self, values: Tensor) -> dict[str, Tensor]:
        """Return the contents of parts; packed scales are relative to the base's offset."""
        codes, scales = _nearest(self._table, values, self.state["blocksize"])
        codes = codes[: values.numel() + values.numel() % 2]
        both = codes[::2] << 4 | codes[1::2]
        if not self._nested:
            return {"codes": both, "absmax": scales}
        shifted, size = scales - self.state["nested_offset"], self.state["nested_blocksize"]
        absmax, nested = _nearest(self._nested_table, shifted, size)
        return {"codes": both, "absmax": absmax[: scales.numel()], "nested_absmax": nested}

    def packing(self) -> str:  # noqa: D102
        state = f"{self.state['quant_type']}, blocks of {self.state['blocksize']}"
        return f"Params4bit, {state}, {self.shape}, {glimpse(self.part('codes').flatten())}"


@dataclass(frozen=True)
class Mxfp4(Packed):
    """MXFP4 experts: blocks of 32 4-bit values and a power of two; transposed when dequantized.

    Source: `transformers/integrations/mxfp4.py`, convert_moe_packed_tensors.
    """

    title = "MXFP4"

    def values(self, part: PartRows, start: int, stop: int) -> Tensor:  # noqa: D102
        n_in, n_out = self.shape[1:]
        pieces = []
        for expert in range(start // n_in, -(-stop // n_in)):
            first, last = max(start - expert * n_in, 0), min(stop - expert * n_in, n_in)
            groups = slice(first // 32, -(-last // 32))  # of inputs, with all outputs
            outputs = expert * n_out, (expert + 1) * n_out
            codes = part("codes", n_in // 2, *outputs).view(n_out, -1, 16)[:, groups].flatten(1)
            scales = part("scales", n_in // 32, *outputs)[:, groups]
            values = mxfp4_values(codes, scales)
            pieces.append(values.t()[first % 32 :][: last - first])
        return torch.cat(pieces)


def float4_codes(values: Tensor) -> Tensor:
    """Return the nearest codes of 4 bits (e2m1), two to a byte; the largest for what is beyond.

    Args:
        values: float32 `(n, ...)`, an even number for each n.

    Returns:
        uint8 `(n, m / 2)`.

    Examples:
        >>> codes = float4_codes(torch.tensor([[0.6, 1.0, 9.0, -5.1]]))
        >>> float4_values(codes).tolist()
        [[0.5, 1.0, 6.0, -6.0]]
    """
    sizes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=values.device)
    middles = (sizes[1:] + sizes[:-1]) / 2
    codes = torch.bucketize(values.abs(), middles) + 8 * torch.signbit(values)
    pairs = codes.flatten(1).to(torch.uint8)
    return pairs[:, ::2] | pairs[:, 1::2] << 4


def _divisor(scales: Tensor) -> Tensor:
    return scales.where(scales > 0, 1.0)


def _nearest(table: Tensor, values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return the places in a table of values over their blocks' greatest, and these; padded."""
    blocks = pad(values.flatten(), (0, -values.numel() % block)).view(-1, block)
    greatest = blocks.abs().amax(dim=1)
    ordered, order = table.sort()
    middles = (ordered[1:] + ordered[:-1]) / 2
    nearest = torch.bucketize(blocks / _divisor(greatest)[:, None], middles, out_int32=True)
    return order.to(torch.uint8)[nearest.flatten()], greatest
