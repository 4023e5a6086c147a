"""The formats of quantized tensors of a checkpoint, whose values are read row by row.

A quantized tensor is stored as several tensors, its parts: codes, scales, tables. Supported are
bitsandbytes' 4 bits, float8 with scales, NVFP4, the MXFP4 experts of GPT-OSS, GPTQ and AWQ.
`quantized_base` finds them in the files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_inject.checkpoint.index import Checkpoint
from lora_inject.core.adapter.fingerprint import glimpse
from lora_inject.core.files.row_reader import RowReader
from lora_inject.core.files.safetensors_file import FLOATS, TensorEntry
from lora_inject.experts import stack_formats

NVFP4_GROUP = 16
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the places in a word of eight neighbors

Rows = Callable[[int, int], Tensor]
"""Function of `(start, stop)` to float32 rows `(stop - start, cols)` of a tensor's matrix."""
PartRows = Callable[[str, int, int, int], Tensor]
"""Function of `(role, n_cols, start, stop)` to rows of a part that is seen with so many columns."""


@dataclass(frozen=True)
class Packed(ABC):
    """A quantized tensor."""

    base: Checkpoint  # the checkpoint as it is stored
    shape: tuple[int, ...]  # its dimensions when dequantized
    parts: Mapping[str, TensorEntry]  # the stored tensors by role; `codes` is the largest

    title: ClassVar[str]  # what messages call the format

    def rows(self) -> Rows:
        """Return the function that reads values, each result valid until the next call."""
        readers = {e.name: RowReader(self.base.path_of(e.name)) for e in self.parts.values()}

        def rows_of_part(role: str, n_cols: int, start: int, stop: int) -> Tensor:
            entry = self.parts[role]
            return readers[entry.name].rows(entry, n_cols, start, stop)

        return partial(self.values, rows_of_part)

    @abstractmethod
    def values(self, part: PartRows, start: int, stop: int) -> Tensor:
        """Return rows of the matrix, float32, of its parts."""

    def packing(self) -> str:
        """Describe the format as `adapter.packing` does for a live model, or as ""."""
        return ""

    def part(self, role: str) -> Tensor:
        """Return a whole part."""
        entry = self.parts[role]
        return RowReader(self.base.path_of(entry.name)).whole(entry)


@dataclass(frozen=True)
class Float8(Packed):
    """Float8 with one scale for every block: `W = q * s`. A block may be a row, or all of W."""

    block: tuple[int, int]
    title = "float8 with scales"

    def values(self, part: PartRows, start: int, stop: int) -> Tensor:  # noqa: D102
        (high, wide), n_cols = self.block, self.shape[1]
        first = start // high
        scales = part("scales", -(-n_cols // wide), first, -(-stop // high))
        of_rows = scales[torch.arange(start, stop, device="cpu") // high - first]
        codes = part("codes", n_cols, start, stop)
        return stack_formats.Float8Stack((1, wide)).values({"codes": codes, "scales": of_rows})


@dataclass(frozen=True)
class Nvfp4(Packed):
    """4 bits (e2m1), a float8 scale for each 16 of them, and a float32 scale for all.

    Sources: compressed_tensors, as
    `compressors/nvfp4` writes it; modelopt, `qtensor/nvfp4_tensor.py`.
    """

    divides: bool  # whether the scale of all divides the others
    title = "NVFP4"

    def values(self, part: PartRows, start: int, stop: int) -> Tensor:  # noqa: D102
        n_in = self.shape[1]
        codes = stack_formats.float4_values(part("codes", n_in // 2, start, stop))
        scales = part("scales", n_in // NVFP4_GROUP, start, stop).float()
        whole = self.part("whole").float()
        steps = scales / whole if self.divides else scales * whole
        return (codes.view(*steps.shape, -1) * steps.unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True)
class FourBit(Packed):
    """4 bits of bitsandbytes: a table's value times its block's scale; scales may be packed.

    Source: `bitsandbytes/functional.py`, QuantState and dequantize_4bit.
    """

    state: Mapping[str, Any]
    title = "bitsandbytes 4-bit"

    def values(self, part: PartRows, start: int, stop: int) -> Tensor:  # noqa: D102
        block, n_cols, dtype = self.state["blocksize"], self.shape[1], FLOATS[self.state["dtype"]]
        first, last = start * n_cols, stop * n_cols
        both = part("codes", 1, first // 2, -(-last // 2)).flatten().int()
        codes = torch.stack([both >> 4, both & 15], dim=1).flatten()[first % 2 :]
        scales = self._scales(part, first // block, -(-last // block))
        of_block = torch.arange(first, last, device="cpu") // block - first // block
        table = self.part("quant_map").float()
        values = table[codes[: last - first]] * scales[of_block]
        return values.to(dtype).float().view(-1, n_cols)

    def _scales(self, part: PartRows, first: int, last: int) -> Tensor:
        """Return the scales of some blocks."""
        scales = part("absmax", 1, first, last).flatten()
        if "nested_absmax" not in self.parts:
            return scales.float()
        size = self.state["nested_blocksize"]
        of_block = torch.arange(first, last, device="cpu") // size - first // size
        nested = part("nested_absmax", 1, first // size, -(-last // size)).float().flatten()
        table, offset = self.part("nested_quant_map").float(), float(self.state["nested_offset"])
        return table[scales.long()] * nested[of_block] + offset

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
            values = stack_formats.Mxfp4Stack().values({"codes": codes, "scales": scales})
            pieces.append(values.t()[first % 32 :][: last - first])
        return torch.cat(pieces)


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
    title = "GPTQ or AWQ"

    def rows(self) -> Rows:
        """Return the function that reads values; the parts are in memory, as rows are columns."""
        parts = {role: self.part(role) for role in self.parts}

        def rows_of_part(role: str, n_cols: int, start: int, stop: int) -> Tensor:
            return parts[role].reshape(-1, n_cols)[start:stop]

        return partial(self.values, rows_of_part)

    def values(self, part: PartRows, start: int, stop: int) -> Tensor:  # noqa: D102
        n_in, n_packed = self.shape[1], 32 // self.bits if self.method == "awq" else 1

        def columns(role: str, first: int, last: int) -> Tensor:
            n_rows, n_cols = self.parts[role].shape
            return part(role, n_cols, 0, n_rows)[:, first:last]

        words = columns("codes", start // n_packed, -(-stop // n_packed))
        if n_packed == 1:
            codes = self._codes(words.t())
        else:
            codes = self._codes(words)[:, start % n_packed :][:, : stop - start].t()
        groups = torch.arange(n_in, device="cpu") // self.size
        if "groups" in self.parts:
            groups = part("groups", n_in, 0, 1)[0].long()
        scales = columns("scales", start, stop)
        zeros = self._zeros(columns("zeros", 0, self.parts["zeros"].shape[1]))[:, start:stop]
        z, s = (t.t()[:, groups] for t in (zeros, scales))
        return ((codes - z) * s.float()).to(scales.dtype).float().contiguous()

    def wraps(self) -> bool:
        """Return whether programs differ on the zeros: 1 more than some needs a further bit."""
        return self.less_one and bool((self._codes(self.part("zeros")) == 2**self.bits - 1).any())

    def _zeros(self, words: Tensor) -> Tensor:
        if self.less_one:  # in whole words, as it was subtracted
            words = words + sum(1 << at for at in range(0, 32, self.bits))
        return self._codes(words)

    def _codes(self, words: Tensor) -> Tensor:
        """Unpack words `(n, m)` to codes `(n, m * 32 / bits)`."""
        places = _AWQ_ORDER if self.method == "awq" else range(32 // self.bits)
        shifts = torch.tensor(
            [self.bits * place for place in places], dtype=torch.int32, device="cpu"
        )
        codes: Tensor = words[..., None] >> shifts & 2**self.bits - 1
        return codes.flatten(1)
