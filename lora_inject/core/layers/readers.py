"""Detect who reads a weight: a forward gets W + delta, all other code gets W itself.

Initialization, ties, optimizers, FSDP2 and user code read and write the raw Parameter. A forward is
a method `forward`, or one that is named like a part of it. The caller is found on the stack. This
costs nothing in forwards that read no weight, and works in every thread and for submodules that are
called directly.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from lora_inject.core.functional.inside import in_backward
from lora_inject.errors import LayerError
from lora_inject.experts.lazy import formed

_CALL = getattr(nn.Module, "_call_impl", nn.Module.__call__).__code__
# Functions that read a weight to put another layer or tensor in its place: torch's by their code,
# those of other libraries (accelerate, bitsandbytes, diffusers, Lightning, timm, torchao,
# transformers, ultralytics) by the name of what reads it.
_REPLACING = {
    inspect.unwrap(function).__code__
    for function in (parametrize.register_parametrization, WeightNorm.apply)
}
_FUSING = ("fuse_", "_fuse_", "replace", "_replace")
_CONVERTING = {"fuse", "from_float", "from_linear", "from_dense", "convert_model"}
_CONVERTING |= {"_convert_layers", "prune_linear_layer"}

# FSDP1 exchanges parameters and views here, in forwards and in backward passes.
_FSDP1 = str(Path(torch.__file__).parent / "distributed" / "fsdp" / "_flat_param.py")

# Methods that users call in place of a forward: how the names of those of timm, CLIP and diffusers
# begin, and those that Lightning calls. `encoder_init` and the like are none of them.
_PARTS = ("forward_", "encode_", "decode_")
_FORWARDS = {"forward", "encode", "decode"}
_FORWARDS |= {"training_step", "validation_step", "test_step", "predict_step"}

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
    by = frame.f_back  # what reads the property
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _FSDP1:
            return None
        if code is _CALL:
            return frame.f_locals["self"]
        if (found := _forward_of(frame)) is not None:
            return found
        if code in _REPLACING:
            _refuse_replacing(code.co_qualname)
        frame = frame.f_back  # type: ignore[assignment]
    name = "" if by is None else by.f_code.co_name
    if name.startswith(_FUSING) or name in _CONVERTING:
        _refuse_replacing(name)
    return SOME_FORWARD if in_backward() else None


def _refuse_replacing(name: str) -> NoReturn:
    found = "the layer has an adapter, whose update the new weight would not have"
    raise LayerError(name, found, "Call merge(model, eject=True) first")


def computes() -> bool:
    """Whether a property is called in a `forward`, and not in a hook around one."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not _CALL:
        if _forward_of(frame) is not None:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _forward_of(frame: FrameType) -> nn.Module | None:
    """Return the module whose method a frame runs, if the method computes as `forward` does."""
    code = frame.f_code
    name = code.co_name
    if not (name in _FORWARDS or name.startswith(_PARTS)) or not code.co_argcount:
        return None
    found = frame.f_locals.get(code.co_varnames[0])
    if not isinstance(found, nn.Module):
        return None
    return found if name == "forward" or hasattr(type(found), name) else None


# LSTM, GRU and RNN hand their weights to a fused kernel in a list of their own. Torch's forward
# reads it under the name `_flat_weights`, which a swapped class makes a property: within a forward
# it holds W + delta, formed there and then, else what torch put into it.

# Methods of torch's that put weights into the list, or move them.
_KEEPING = {nn.RNNBase.flatten_parameters.__code__, nn.RNNBase.__setattr__.__code__}


def _flat_weights(self: Any) -> Any:
    stored = self.__dict__["_flat_weights"]
    if torch.compiler.is_compiling():
        return _effective(self)
    # Their places in memory are those of the raw weights, whoever asks for them to be moved.
    keeps = sys._getframe(1).f_code in _KEEPING or running_module() is None
    return stored if keeps else _effective(self)


@torch.compiler.disable  # type: ignore[untyped-decorator] # dynamo runs such layers as they are
def _effective(self: Any) -> Any:
    """Return what the kernel gets."""
    return [formed(getattr(self, name, None)) for name in self._flat_weights_names]


def _write(self: Any, weights: list[Any]) -> None:
    self.__dict__["_flat_weights"] = weights


def _update(self: Any) -> None:
    """What torch does where a weight was replaced: here the attributes are read each time."""


RECURRENT = {"_flat_weights": property(_flat_weights, _write), "_update_flat_weights": _update}
"""Members of the swapped class of an LSTM, GRU or RNN."""
