"""Refuse to train a copy in a module that moves its own buffers while it trains.

A buffer that moves (statistics, a moving average) belongs to the base: an adapter neither holds nor
restores it. No name and no dtype tells it from a constant, so each forward in training does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lora_inject.core.functional.torch_inside import is_watched
from lora_inject.core.layers.attached import Attached, attached_to
from lora_inject.errors import LayerError


def watched(module: nn.Module) -> Callable[[], None] | None:
    """Return what raises if a forward of a module in training, which begins now, moves a buffer."""
    attached = attached_to(module)
    assert attached is not None
    before = _saved_buffers(module, attached)
    return partial(_refuse_moved, module, before) if before else None


def _saved_buffers(module: nn.Module, attached: Attached) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the saved buffers of a module that trains a copy, with their values."""
    if is_watched(unknown=False):
        return {}
    if all(entry.spec is not None or entry.scale is not None for entry in attached.entries()):
        return {}
    saved = module._buffers.keys() - module._non_persistent_buffers_set
    held = {name: module._buffers[name] for name in sorted(saved)}
    return {
        name: (b, b.detach().clone())
        for name, b in held.items()
        if type(b) is Tensor and not b.is_meta
    }


def _refuse_moved(module: nn.Module, before: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Raise if a forward has moved a buffer, after all have their values again."""
    now = module._buffers
    moved = [
        name
        for name, (_, values) in before.items()
        if (b := now.get(name)) is None
        or b.shape != values.shape
        or not torch.allclose(b, values, rtol=0, atol=0, equal_nan=True)
    ]
    if moved:
        with torch.no_grad():
            for name, (buffer, values) in before.items():
                module._buffers[name] = buffer
                buffer.copy_(values)
        raise LayerError(
            f"training a {type(module).__name__} in full",
            f"its forward moves its buffer {moved[0]!r} as well: that is the base's, which an "
            "adapter neither holds nor restores",
            "Leave it out of train, or call eval() on it while the rest trains",
        )
