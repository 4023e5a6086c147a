"""One tensor that a merge writes, and what it becomes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_inject.core.functional.factors import Patch
from lora_inject.core.functional.fold import Delta, rows_at_once
from lora_inject.core.functional.gain import Gain
from lora_inject.core.functional.rounded_fold import GainedDelta, Tally
from lora_inject.core.layers.packed_weights import loaded_kinds
from lora_inject.core.layers.plain_tensors import sharded_by
from lora_inject.core.layers.survey import Holder
from lora_inject.core.model.undo import Undone


@dataclass
class Target:
    """One tensor to write, which is plain; see `PackedTarget` for others."""

    is_packed: ClassVar[bool] = False

    holder: Holder  # where it stands
    terms: list[Patch] = field(default_factory=list)  # low-rank updates to fold in
    gain: Gain | None = None  # what multiplies the outputs of their sum with W
    # Trained copies, each with its weight and the rows that it is of, None for all.
    copies: list[tuple[Tensor, float, tuple[int, ...] | None]] = field(default_factory=list)
    # Who else holds the same memory, and must not see the merge.
    sharers: list[Holder] = field(default_factory=list)
    tally: Tally | None = None  # what rounding left, where it was counted

    @property
    def name(self) -> str:
        """Name of the tensor."""
        return self.holder.name

    @property
    def changes(self) -> bool:
        """Whether an adapter takes part: a quantized weight may be unpacked without one."""
        return bool(self.terms or self.copies)

    @property
    def weight(self) -> nn.Parameter:
        """The tensor."""
        return self.holder.tensor

    @property
    def due_shape(self) -> tuple[int, ...]:
        """The shape that the adapters say it has."""
        if self.terms:
            return self.terms[0].spec.weight_shape
        copy, _, rows = self.copies[0]
        return tuple(self.weight.shape if rows is not None else copy.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Its shape as one matrix."""
        if self.terms:
            return self.terms[0].spec.matrix_shape
        return (self.weight.shape[0] if self.weight.dim() else 1, -1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the merged values."""
        return self.weight.dtype

    @property
    def narrow(self) -> bool:
        """Whether the result has 16 bits or less, which may lose a part of a delta."""
        return self.dtype.itemsize <= 2

    @property
    def action(self) -> str:
        """What a report calls what is done."""
        if self.sharers:
            return "untied"
        return "folded" if self.terms else "replaced"

    def replace(self) -> Undone | None:
        """Put what a packed weight becomes in its place, and return what takes it back."""
        return None

    @property
    def is_writable(self) -> bool:
        """Whether a delta can be added where the weight stands; `merge_reasons` says why not."""
        weight = self.weight
        if self.is_packed or loaded_kinds() or weight.is_meta or sharded_by(weight):
            return False
        whole = tuple(weight.shape) == self.due_shape and weight.is_contiguous()
        shared = weight.is_cpu and weight.is_shared()  # type: ignore[no-untyped-call]
        return whole and not weight.is_inference() and not shared

    @cached_property
    def delta(self) -> Delta:
        """The terms, prepared for all blocks."""
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        if self.gain is None:
            return Delta(self.terms, wide)
        gained = GainedDelta(self.terms, wide, self.gain)
        gained.norms_of(self.blocks())
        return gained

    def may_overflow(self) -> bool:
        """Whether the largest possible value of a delta is near the largest of the dtype."""
        if self.gain is not None:
            return True
        norm = torch.linalg.vector_norm
        bound = sum(
            abs(t.spec.scale * t.weight) * float(norm(t.A)) * float(norm(t.B)) for t in self.terms
        )
        return not bound <= 1e-6 * torch.finfo(self.dtype).max

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield `(first row, rows)` of the weight matrix, views in the storage of a plain one."""
        return self.split(self.values())

    def split(self, values: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield `(first row, rows)` of values in the shape of the weight."""
        matrix = values.view(self.matrix_shape)
        step = rows_at_once(matrix)
        for start in range(0, len(matrix), step):
            yield start, matrix[start : start + step]

    def values(self) -> Tensor:
        """Return W; of a packed one what it stands for."""
        return self.weight.detach()
