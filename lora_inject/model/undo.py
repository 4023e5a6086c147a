"""What `merge` keeps of each tensor that it writes, and how `unmerge` puts it back.

Nothing is subtracted: the values of before are kept. A sum over the bits of what was written tells
whether somebody has changed it since, which costs a pass over it at either end and no memory.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.errors import StateError
from lora_inject.layers.survey import Holder, Survey
from lora_inject.model.quantized_layers import Layer

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 17  # words: 1 MiB, which a CPU's cache holds


@dataclass
class Undo:
    """What `unmerge` puts back for one tensor."""

    holder: Holder  # where it stands
    merged: nn.Parameter  # what was written there
    before: nn.Parameter  # what stood there
    # The values before as a matrix; None where `before` still has them or nothing is kept.
    original: Tensor | None = None
    partner: Holder | None = None  # of an untied tensor: who else held its memory, and still does
    layer: Layer | None = None  # of a quantized weight that was replaced: the state of its layer
    written: tuple[torch.dtype, Tensor] | None = None  # dtype and `checksum` of what was written

    @property
    def lost(self) -> bool:
        """Whether values are written over that nobody keeps."""
        return self.original is None and self.partner is None and self.layer is None

    def note_written(self) -> None:
        """Note what stands there now, unless running the layer changes it."""
        # An embedding with max_norm scales the rows that it looks up, in place.
        if getattr(self.holder.module, "max_norm", None) is None:
            self.written = self.merged.dtype, checksum(self.merged)

    def check(self, survey: Survey, discard: bool) -> None:
        """Check that the weight is still the one that was merged, in a layer of the model."""
        asked, module = f"unmerge of {self.holder.name!r}", self.holder.module
        if id(module) not in survey.paths:
            found = "its layer is not in the model any more"
            raise StateError(asked, found, "Put the layer back first")
        now: Any = module._parameters.get(self.holder.param)
        same = now is self.merged or now is self.before
        if same and self.layer is not None and now.device != self.before.device:
            remedy = f"Move the model back to {self.before.device} first"
            raise StateError(asked, f"it was moved to {now.device} since the merge", remedy)
        if not same or (self.original is not None and now.numel() != self.original.numel()):
            raise StateError(
                asked,
                "the weight was replaced since the merge, and what was kept is not its base",
                "Put the merged Parameter back, or eject the adapters and load the base again",
            )
        if not discard and self._edited(now):
            raise StateError(
                asked,
                "its values were changed since the merge, which unmerge would drop",
                "Call unmerge(model, discard=True) to drop the change, or eject(model) to keep it "
                "with what was merged",
            )

    def _edited(self, now: nn.Parameter) -> bool:
        """Whether a weight has other values than were written; not known once it was cast."""
        if now is not self.merged or self.written is None or now.dtype != self.written[0]:
            return False
        if int(checksum(now)) == int(self.written[1]):
            return False
        if self.original is None:
            return True
        # An interrupted call may have restored it already.
        return not torch.equal(now.detach().view(self.original.shape), self.original.to(now.device))

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
                self.merged.detach().view(self.original.shape).copy_(self.original)


def restore(undos: Iterable[Undo]) -> None:
    """Put everything back, the last first: a tie is restored to a tensor that already was."""
    for undo in reversed(list(undos)):
        undo.restore()


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


@contextmanager
def held_back_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait until the last weight is written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)
