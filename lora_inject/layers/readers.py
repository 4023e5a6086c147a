"""Who reads a weight: a forward, which is to find W + delta, or anybody else, who gets W itself.

Initialization, ties, optimizers, FSDP2 and a user's own code read and write the raw Parameter. The
caller is known from the stack, which costs a forward that reads no weight nothing, holds in every
thread, and for a submodule that is called directly as for the whole model.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import fusion

from lora_inject.errors import LayerError

_CALL = nn.Module._call_impl.__code__
_FUSING = {f.__code__ for f in (fusion.fuse_conv_bn_eval, fusion.fuse_linear_bn_eval)}

# Stands for a forward whose module is not known: a compiled or a recomputed one.
SOME_FORWARD = object()


def running_module() -> Any:
    """Return the innermost module whose forward the caller of a property runs in.

    Returns:
        The module; `SOME_FORWARD` where it cannot be told, as in a compiled graph and in a backward
        pass, which recomputes checkpointed forwards; None outside of forwards.
    """
    if torch.compiler.is_compiling():
        return SOME_FORWARD
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code is _CALL:
            return frame.f_locals["self"]
        if (found := _forward_of(frame)) is not None:
            return found
        if code in _FUSING:
            raise LayerError(
                f"torch.nn.utils.{code.co_name}",
                "the layer carries an adapter, whose update would be left as it is",
                "Call merge(model, eject=True) first, then fuse",
            )
        frame = frame.f_back  # type: ignore[assignment]
    return SOME_FORWARD if torch._C._current_graph_task_id() != -1 else None


def computes() -> bool:
    """Whether the caller of a property runs in a `forward`, and not in a hook around one."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not _CALL:
        if _forward_of(frame) is not None:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _forward_of(frame: FrameType) -> nn.Module | None:
    """Return the module whose method `forward` a frame runs."""
    code = frame.f_code
    if code.co_name != "forward" or not code.co_argcount:
        return None
    found = frame.f_locals.get(code.co_varnames[0])
    return found if isinstance(found, nn.Module) else None
