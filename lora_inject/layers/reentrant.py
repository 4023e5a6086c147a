"""A checkpoint that can pass no gradient to adapters, found before it does so in silence.

One idea: the reentrant mode of `torch.utils.checkpoint` is an autograd Function of its tensor
inputs. Where none of them requires a gradient, as the embeddings of a frozen model do not, its
output requires none either, and every adapter inside is inert. Layers that are about to train look
for that Function on the call stack.
"""

from __future__ import annotations

import sys

import torch
from torch.utils.checkpoint import CheckpointFunction

from lora_inject.errors import LayerError

__all__ = ["refuse_dead_checkpoint"]

_CHECKPOINT_FORWARD = CheckpointFunction.forward.__code__


def refuse_dead_checkpoint() -> None:
    """Raise where the caller runs in a reentrant checkpoint that will ask for no gradient.

    Raises:
        LayerError: The innermost reentrant checkpoint has no input that requires a gradient.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _CHECKPOINT_FORWARD:
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
