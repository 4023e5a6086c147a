"""What `unmerge` puts back for one tensor, and whether what was written still stands there.

A sum over the bits of what was written tells whether somebody has changed it since, which costs a
pass over it at either end and no memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_inject.core.layers.plain_tensors import is_quantized
from lora_inject.core.layers.survey import Holder, Survey
from lora_inject.core.layers.weight_kinds import Undo

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 17  # words: 1 MiB, which a CPU's cache holds


@dataclass
class Undone:
    """What `unmerge` puts back for one tensor."""

    holder: Holder  # where it stands
    merged: nn.Parameter  # what was written there
    before: nn.Parameter  # what stood there
    # The values before as a matrix; None where `before` still has them or nothing is kept.
    original: Tensor | None = None
    partner: Holder | None = None  # of an untied tensor: who else held its memory, and still does
    layer: Undo | None = None  # of a quantized weight that was replaced: the state of its layer
    written: tuple[torch.dtype, Tensor] | None = None  # dtype and `checksum` of what was written

    @property
    def lost(self) -> bool:
        """Whether values are written over that nobody keeps."""
        return self.original is None and self.partner is None and self.layer is None

    def note_written(self) -> None:
        """Note what stands there now, unless running the layer changes it."""
        # An embedding with max_norm scales the rows that it looks up; some rearrange packed codes.
        scales_rows = getattr(self.holder.module, "max_norm", None) is not None
        if not (scales_rows or is_quantized(self.merged)):
            self.written = self.merged.dtype, checksum(self.merged)

    def stands(self, survey: Survey) -> bool:
        """Whether a plain weight of this process alone stands in its layer as it was written."""
        module, now = self.holder.module, self.merged
        if module._parameters.get(self.holder.param) is not now or self.layer is not None:
            return False
        if now.is_cpu and now.is_shared():  # type: ignore[no-untyped-call]
            return False
        if id(module) not in survey.paths or self.written is None or now.dtype != self.written[0]:
            return False
        return int(checksum(now)) == int(self.written[1])

    def restore(self) -> None:
        """Put the values, or the tie, back."""
        with torch.no_grad():
            if self.layer is not None:
                self.layer.put_back()
            elif self.partner is not None:
                there = self.partner.tensor
                if there.untyped_storage().data_ptr() != self.before.untyped_storage().data_ptr():
                    self.before.data = there.data  # the model was cast or moved meanwhile
                self.holder.module._parameters[self.holder.param] = self.before
            elif self.original is not None:
                self.merged.detach().copy_(self.original.view(self.merged.shape))  # any strides


def checksum(values: Tensor) -> Tensor:
    """Return a sum over the bits of a tensor, on its device, in which each word has its own factor.

    It is exact, so equal on every device. No word can change alone without it.
    """
    flat = values.detach().reshape(-1)
    whole = flat.numel() * flat.element_size() % 8 == 0
    words = flat.view(torch.int64 if whole else _WORDS[flat.element_size()])
    factors = torch.arange(1, 2 * _CHUNK, 2, device=flat.device)  # odd: none loses a bit
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for chunk in words.split(_CHUNK):  # type: ignore[no-untyped-call]
        total = total * 31 + (chunk * factors[: len(chunk)]).sum()
    return total
