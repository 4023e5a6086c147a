"""The formats of quantized tensors of a checkpoint: values read row by row, and encoded again.

A quantized tensor is stored as several tensors, its parts: codes, scales, tables. Supported are
bitsandbytes' 4 and 8 bits, float8 with scales, NVFP4, the MXFP4 experts of GPT-OSS, GPTQ and AWQ.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_inject.checkpoint.index import Checkpoint
from lora_inject.core.adapter.packing import glimpse
from lora_inject.core.files.row_reader import RowReader, rows_per_block
from lora_inject.core.files.safetensors_file import DTYPES, FLOATS, TensorEntry
from lora_inject.errors import CheckpointError
from lora_inject.experts import stack_formats

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the places in a word of eight neighbors

Rows = Callable[[int, int], Tensor]
"""Function of `(start, stop)` to float32 rows `(stop - start, cols)` of a tensor's matrix."""


@dataclass(frozen=True)
class Packed(ABC):
    """A quantized tensor."""

    base: Checkpoint  # the checkpoint as it is stored
    shape: tuple[int, ...]  # its dimensions when dequantized
    parts: Mapping[str, TensorEntry]  # the stored tensors by role; `codes` is the largest
    held: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)  # read instead of parts

    written: ClassVar[tuple[str, ...]] = ()  # roles of the parts that `encoded` makes, if any

    @property
    def form(self) -> str:
        """The name of the format in reports."""
        return type(self).__name__.lower()

    @abstractmethod
    def rows(self) -> Rows:
        """Read the scales, and return the function that reads values; for one thread."""

    @property
    def unit(self) -> int:
        """Number of rows that can be encoded independently of the others."""
        return 1

    def encoded(self, values: Tensor) -> dict[str, Tensor]:
        """Return the contents of parts for some rows of float32 values; they begin at a `unit`."""
        raise NotImplementedError(self.form)

    def packing(self) -> str:
        """Describe the format as `adapter.packing` does for a live model, or as ""."""
        return ""

    def part(self, role: str) -> Tensor:
        """Return a whole part."""
        if role in self.held:
            return self.held[role]
        entry = self.parts[role]
        return RowReader(self.base.path_of(entry.name)).whole(entry)

    def read(self, role: str = "codes", n_cols: int = 1, *, as_bytes: bool = False) -> Rows:
        """Return the function that reads rows of a part, each result valid until the next call."""
        if role in self.held:
            flat = self.held[role].flatten()
            rows = (flat.view(torch.uint8) if as_bytes else flat).view(-1, n_cols)
            return lambda start, stop: rows[start:stop]
        entry = replace(self.parts[role], dtype="U8") if as_bytes else self.parts[role]
        reader = RowReader(self.base.path_of(entry.name))
        return lambda start, stop: reader.rows(entry, n_cols, start, stop)


@dataclass(frozen=True)
class Float8(Packed):
    """Float8 with one scale for every block: `W = q * s`. A block may be a row, or all of W."""

    block: tuple[int, int]
    powers: bool  # whether the scales are powers of two
    written = ("codes", "scales")

    def rows(self) -> Rows:  # noqa: D102
        codes, (high, wide) = self.read(n_cols=self.shape[1]), self.block
        scales = self.part("scales").float().reshape(-1, -(-self.shape[1] // wide))

        def read(start: int, stop: int) -> Tensor:
            per_row = scales[torch.arange(start, stop, device="cpu") // high]
            spread = per_row.repeat_interleave(wide, dim=1)[:, : self.shape[1]]
            return codes(start, stop).float() * spread

        return read

    @property
    def unit(self) -> int:  # noqa: D102
        return self.block[0]

    def encoded(self, values: Tensor) -> dict[str, Tensor]:  # noqa: D102
        (n_rows, n_cols), (high, wide) = values.shape, self.block
        padded = pad(values, (0, -n_cols % wide, 0, -n_rows % high))
        blocks = padded.view(-1, high, padded.shape[1] // wide, wide)
        scales = blocks.abs().amax(dim=(1, 3)) / stack_formats.MAX_FLOAT8
        scales = scales.log2().ceil().exp2() if self.powers else scales
        scales = scales.to(DTYPES[self.parts["scales"].dtype])
        scaled = blocks / _divisor(scales.float())[:, None, :, None]
        codes = scaled.clamp(-stack_formats.MAX_FLOAT8, stack_formats.MAX_FLOAT8).to(
            torch.float8_e4m3fn
        )
        return {"codes": codes.view(padded.shape)[:n_rows, :n_cols].contiguous(), "scales": scales}


@dataclass(frozen=True)
class Nvfp4(Packed):
    """4 bits (e2m1), a float8 scale for each 16 of them, and a float32 scale for all.

    That of all is kept when the others are made anew.
    """

    divides: bool  # whether the scale of all divides the others
    written = ("codes", "scales")

    def rows(self) -> Rows:  # noqa: D102
        n_in = self.shape[1]
        values = self._form.values
        codes = self.read(n_cols=n_in // 2, as_bytes=True)
        whole = self.part("whole").float()
        scales = self.read("scales", n_in // stack_formats.NVFP4_GROUP)
        return lambda start, stop: values(
            {"codes": codes(start, stop), "scales": scales(start, stop), "whole": whole}
        )

    @property
    def _form(self) -> stack_formats.Nvfp4Stack:
        return stack_formats.Nvfp4Stack(self.divides)

    def encoded(self, values: Tensor) -> dict[str, Tensor]:
        """Return the contents of parts, each value the nearest that its group holds.

        Raises:
            CheckpointError: A value is further beyond all of them than they are from each other.
        """
        whole = self.part("whole").float()
        unit = self._form.scales(torch.ones(()), whole)
        groups = values.view(len(values), -1, stack_formats.NVFP4_GROUP)
        largest = groups.abs().amax(dim=2)
        top = stack_formats.MAX_FLOAT8 * unit
        # The codes lie 2 apart at 6: one that is off by 1 is as good as the format's others.
        if bool((largest > (stack_formats.MAX_FLOAT4 + 1) * top).any()):
            name = self.parts["codes"].name
            problem = f"merged, it has values up to {float(largest.max()):.3g}; its scale of all "
            problem += f"groups holds up to {float(stack_formats.MAX_FLOAT4 * top):.3g}"
            remedy = "Write plain floats (--dequantize bfloat16)"
            raise CheckpointError(f"requantize '{name}'", problem, remedy)
        wanted = (largest / stack_formats.MAX_FLOAT4 / unit).clamp(max=stack_formats.MAX_FLOAT8)
        scales = wanted.to(torch.float8_e4m3fn)
        steps = _divisor(self._form.scales(scales, whole))
        return {"codes": stack_formats.float4_codes(groups / steps[..., None]), "scales": scales}


@dataclass(frozen=True)
class Int8(Packed):
    """Int8 of bitsandbytes: `W = q * s / 127`, one scale for every row."""

    written = ("codes", "scales")

    def rows(self) -> Rows:  # noqa: D102
        codes, scales = self.read(n_cols=self.shape[1]), self.part("scales").float().flatten() / 127
        return lambda start, stop: codes(start, stop).float() * scales[start:stop, None]

    def encoded(self, values: Tensor) -> dict[str, Tensor]:  # noqa: D102
        scales = values.abs().amax(dim=1)
        codes = (values / _divisor(scales)[:, None] * 127).round().to(torch.int8)
        return {"codes": codes, "scales": scales.to(DTYPES[self.parts["scales"].dtype])}

    def packing(self) -> str:  # noqa: D102
        return f"Int8Params, {glimpse(self.part('codes'))}"


@dataclass(frozen=True)
class FourBit(Packed):
    """4 bits of bitsandbytes: a table's value times its block's scale; scales may be packed.

    Source: `bitsandbytes/functional.py`, QuantState and dequantize_4bit.
    """

    state: Mapping[str, Any]
    written = ("codes", "absmax", "nested_absmax")

    @property
    def form(self) -> str:  # noqa: D102
        return str(self.state["quant_type"])

    @property
    def _nested(self) -> bool:
        return "nested_absmax" in self.parts

    def rows(self) -> Rows:  # noqa: D102
        code, absmax = self.part("quant_map").float(), self._absmax()
        block, n_cols, dtype = self.state["blocksize"], self.shape[1], FLOATS[self.state["dtype"]]
        read_bytes = self.read(as_bytes=True)

        def read(start: int, stop: int) -> Tensor:
            first, last = start * n_cols, stop * n_cols
            packed = read_bytes(first // 2, -(-last // 2)).flatten().int()
            codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[first % 2 :]
            of_block = torch.arange(first, last, device="cpu") // block
            values = code[codes[: last - first]] * absmax[of_block]
            return values.to(dtype).float().view(-1, n_cols)

        return read

    def _absmax(self) -> Tensor:
        absmax = self.part("absmax").flatten()
        if not self._nested:
            return absmax.float()
        of_block = torch.arange(absmax.numel(), device="cpu") // self.state["nested_blocksize"]
        scales = self.part("nested_absmax").float().flatten()[of_block]
        offset: float = self.state["nested_offset"]
        return self.part("nested_quant_map").float()[absmax.long()] * scales + offset

    @property
    def unit(self) -> int:  # noqa: D102
        n_values: int = self.state["blocksize"]
        n_values *= self.state["nested_blocksize"] if self._nested else 2
        return n_values // math.gcd(n_values, self.shape[1])

    def encoded(self, values: Tensor) -> dict[str, Tensor]:
        """Return the contents of parts; packed scales are relative to the base's offset."""
        codes, absmax = _nearest(self.part("quant_map"), values, self.state["blocksize"])
        codes = codes[: values.numel() + values.numel() % 2]
        packed = codes[::2] << 4 | codes[1::2]
        if not self._nested:
            return {"codes": packed, "absmax": absmax}
        shifted, size = absmax - self.state["nested_offset"], self.state["nested_blocksize"]
        nested, scales = _nearest(self.part("nested_quant_map"), shifted, size)
        return {"codes": packed, "absmax": nested[: absmax.numel()], "nested_absmax": scales}

    def packing(self) -> str:  # noqa: D102
        state = f"{self.state['quant_type']}, blocks of {self.state['blocksize']}"
        codes = self.part("codes").flatten().view(torch.uint8)
        return f"Params4bit, {state}, {self.shape}, {glimpse(codes)}"


@dataclass(frozen=True)
class Mxfp4(Packed):
    """MXFP4 experts: blocks of 32 4-bit values and a power of two; transposed when dequantized.

    Source: `transformers/integrations/mxfp4.py`, convert_moe_packed_tensors.
    """

    def rows(self) -> Rows:  # noqa: D102
        read_codes, read_scales = self.read(), self.read("scales")
        n_in, n_out = self.shape[1:]
        values = stack_formats.Mxfp4Stack().values
        latest: dict[int, Tensor] = {}

        def expert(index: int) -> Tensor:
            if index not in latest:
                size = n_out * n_in // 2
                codes = read_codes(index * size, (index + 1) * size).view(n_out, -1)
                scales = read_scales(index * size // 16, (index + 1) * size // 16).view(n_out, -1)
                latest.clear()
                latest[index] = values({"codes": codes, "scales": scales}).t()
            return latest[index]

        def read(start: int, stop: int) -> Tensor:
            pieces = []
            for index in range(start // n_in, -(-stop // n_in)):
                first, last = max(start - index * n_in, 0), min(stop - index * n_in, n_in)
                pieces.append(expert(index)[first:last])
            return torch.cat(pieces)

        return read


@dataclass(frozen=True)
class PackedWords(Packed):
    """GPTQ and AWQ: `W = (q - z) * s`, rounded to the dtype of the scales as gptqmodel does.

    Integers are packed into words of 32 bits, with a scale and a zero for each group. The weight is
    transposed: `qweight` (in, out), `qzeros` and `scales` (groups, out). GPTQ packs `qweight` along
    the inputs, and AWQ along the outputs; both pack `qzeros` along the outputs.

    Source: `gptqmodel/nn_modules/qlinear/__init__.py`, dequantize_weight, and
    `awq/utils/packing_utils.py`, dequantize_gemm.
    """

    method: str  # gptq or awq
    bits: int
    size: int  # inputs in a group, if there is no part `groups` (`g_idx`)
    less_one: bool  # whether 1 was subtracted from the zeros

    @property
    def form(self) -> str:  # noqa: D102
        return self.method

    def rows(self) -> Rows:  # noqa: D102
        n_in, scales, zeros = self.shape[1], self.part("scales"), self.part("zeros")
        if self.less_one:  # in whole words, as it was subtracted
            zeros = zeros + sum(1 << at for at in range(0, 32, self.bits))
        zeros, groups = self._codes(zeros), torch.arange(n_in, device="cpu") // self.size
        if "groups" in self.parts:
            groups = self.part("groups").long()
        columns, n_packed = self._columns(), 32 // self.bits if self.method == "awq" else 1

        def read(start: int, stop: int) -> Tensor:
            words = columns(start // n_packed, -(-stop // n_packed))
            if n_packed == 1:
                codes = self._codes(words.t())
            else:
                codes = self._codes(words)[:, start % n_packed :][:, : stop - start].t()
            z, s = (t[:, start:stop].t()[:, groups] for t in (zeros, scales))
            return ((codes - z) * s.float()).to(scales.dtype).float().contiguous()

        return read

    def wraps(self) -> bool:
        """Return whether programs differ on the zeros: 1 more than some needs a further bit."""
        return self.less_one and bool((self._codes(self.part("zeros")) == 2**self.bits - 1).any())

    def _codes(self, words: Tensor) -> Tensor:
        """Unpack words `(n, m)` to codes `(n, m * 32 / bits)`."""
        places = _AWQ_ORDER if self.method == "awq" else range(32 // self.bits)
        shifts = torch.tensor(
            [self.bits * place for place in places], dtype=torch.int32, device="cpu"
        )
        codes: Tensor = words[..., None] >> shifts & 2**self.bits - 1
        return codes.flatten(1)

    def _columns(self) -> Rows:
        """Return the function that reads columns of words, those of one span at a time."""
        n_rows, n_cols = self.parts["codes"].shape
        read_words, width = self.read(), rows_per_block(n_rows, 2)
        first, held = 0, torch.empty(n_rows, 0, dtype=torch.int32, device="cpu")

        def read(start: int, stop: int) -> Tensor:
            nonlocal first, held
            if not first <= start <= stop <= first + held.shape[1]:
                first, last = start, min(n_cols, max(stop, start + width))
                held = torch.empty(n_rows, last - first, dtype=torch.int32, device="cpu")
                for row, at in enumerate(range(0, n_rows * n_cols, n_cols)):
                    held[row] = read_words(at + first, at + last).flatten()
            return held[:, start - first : stop - first]

        return read


def _divisor(scales: Tensor) -> Tensor:
    return scales.where(scales > 0, 1.0)


def _nearest(table: Tensor, values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return the places in a table of values over their blocks' greatest, and these; padded."""
    blocks = pad(values.flatten(), (0, -values.numel() % block)).view(-1, block)
    greatest = blocks.abs().amax(dim=1)
    ordered, order = table.float().flatten().sort()
    middles = (ordered[1:] + ordered[:-1]) / 2
    nearest = torch.bucketize(blocks / _divisor(greatest)[:, None], middles, out_int32=True)
    return order.to(torch.uint8)[nearest.flatten()], greatest
