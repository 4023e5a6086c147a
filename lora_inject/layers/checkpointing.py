"""The reentrant mode of `torch.utils.checkpoint`, seen from inside a layer.

That mode is an autograd Function, and whoever runs inside it finds its frames on the call
stack. Its forward tells a checkpoint that can pass no gradient to adapters: where none of its
inputs requires one, as the embeddings of a frozen model do not, its output requires none either,
and every adapter inside would be inert. Its backwards tell which checkpoints are being recomputed.
"""

from __future__ import annotations

import sys

import torch
from torch.utils.checkpoint import CheckpointFunction

from lora_inject.errors import LayerError

_FORWARD = CheckpointFunction.forward.__code__
_BACKWARD = CheckpointFunction.backward.__code__


def reentrant_backwards() -> list[int]:
    """Return the autograd numbers of the checkpoints being recomputed, the innermost first."""
    numbers = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _BACKWARD:
            numbers.append(int(frame.f_locals["ctx"]._sequence_nr()))
        frame = frame.f_back  # type: ignore[assignment]
    return numbers


def refuse_dead_checkpoint() -> None:
    """Raise where the caller runs in a reentrant checkpoint that will ask for no gradient.

    Raises:
        LayerError: The innermost reentrant checkpoint has no input that requires a gradient.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _FORWARD:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return
    inputs = frame.f_locals.get("args", ())
    if not any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs):
        raise LayerError(
            "training an adapter inside a reentrant checkpoint",
            "no input of the checkpoint requires a gradient, so none would reach the adapter",
            "Checkpoint with use_reentrant=False, or let the embeddings' output require a gradient "
            "(transformers: model.enable_input_require_grads()); use model.eval() to only evaluate",
        )
