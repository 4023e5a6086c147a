"""GPTQ and AWQ: integers packed into words of 32 bits, with a scale and a zero for each group.

Both store the weight transposed: `qweight` (in, out), `qzeros` and `scales` (groups, out). GPTQ
packs `qweight` along the inputs, and AWQ along the outputs; both pack `qzeros` along the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_inject.checkpoint.packed import Packed, Rows
from lora_inject.storage.tensor_rows import rows_per_block

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the places in a word of eight neighbors


@dataclass(frozen=True)
class PackedWords(Packed):
    """`W = (q - z) * s`, rounded to the dtype of the scales as gptqmodel's layers do.

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
