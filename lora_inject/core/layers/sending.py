"""Numbers of Python, sent to a device without waiting for it."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from lora_inject.core.functional.torch_inside import constant_in_graphs


def sent(
    numbers: Sequence[object], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Return numbers as a tensor on a device, for a later backward too.

    On CUDA the copy is from pinned memory, since a copy of other memory waits for all that the
    device has to do. It is in the order of the current stream.
    """
    pinned = device.type == "cuda"
    with torch.inference_mode(False):
        made = torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=pinned)
        return made.to(device, non_blocking=True)


def queue_of(device: torch.device) -> Hashable:
    """Return what orders the work of the caller on a device: on CUDA its current stream."""
    return (device, torch.cuda.current_stream(device)) if device.type == "cuda" else device


def sent_once(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers as a tensor that is kept, for code that asks for them in each forward."""
    if torch.compiler.is_compiling():
        tensor: Tensor = _constant(numbers, device)
        return tensor
    return _kept(numbers, device, queue_of(device))


@functools.lru_cache(maxsize=64)
def _kept(numbers: tuple[int, ...], device: torch.device, queue: Hashable) -> Tensor:
    del queue  # what is sent is there for later work in it
    return sent(numbers, device)


@constant_in_graphs
def _constant(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a constant of a graph, which would else make and send them in each forward."""
    return torch.tensor(numbers, device=device)
