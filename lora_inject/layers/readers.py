"""Detect who reads a weight: a forward gets W + delta, all other code gets W itself.

Initialization, ties, optimizers, FSDP2 and user code read and write the raw Parameter. The caller
is found on the stack. This costs nothing in forwards that read no weight, and works in every
thread and for submodules that are called directly.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import fusion
from torch.nn.utils.weight_norm import WeightNorm

from lora_inject.errors import LayerError

_CALL = nn.Module._call_impl.__code__
# Functions of torch that read a weight to put another in its place, to the name of the step.
_REPLACING = {
    inspect.unwrap(function).__code__: (name, step)
    for function, name, step in (
        (fusion.fuse_conv_bn_eval, "fuse_conv_bn_eval", "fuse"),
        (fusion.fuse_linear_bn_eval, "fuse_linear_bn_eval", "fuse"),
        (WeightNorm.apply, "weight_norm", "normalize"),
    )
}

# FSDP1 exchanges parameters and views here, in forwards and in backward passes.
_FSDP1 = str(Path(torch.__file__).parent / "distributed" / "fsdp" / "_flat_param.py")

# A forward whose module is not known: compiled or recomputed.
SOME_FORWARD = object()


def running_module() -> Any:
    """Return the innermost module whose forward calls a property, None outside of forwards.

    `SOME_FORWARD` if it is not known, as in a compiled graph and in a backward pass, which
    recomputes checkpointed forwards.
    """
    if torch.compiler.is_compiling():
        return SOME_FORWARD
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _FSDP1:
            return None
        if code is _CALL:
            return frame.f_locals["self"]
        if (found := _forward_of(frame)) is not None:
            return found
        if code in _REPLACING:
            name, step = _REPLACING[code]
            raise LayerError(
                f"torch.nn.utils.{name}",
                "the layer has an adapter, whose update the new weight would not have",
                f"Call merge(model, eject=True) first, then {step}",
            )
        frame = frame.f_back  # type: ignore[assignment]
    return SOME_FORWARD if torch._C._current_graph_task_id() != -1 else None


def computes() -> bool:
    """Whether a property is called in a `forward`, and not in a hook around one."""
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
