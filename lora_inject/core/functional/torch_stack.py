"""What the caller runs in: a backward, checkpoints, a forward, a trace or a generator.

| question | asked of |
|---|---|
| which node of a backward runs? | autograd's engine |
| which checkpoints does the caller run in? | hooks on saved tensors, the stack |
| does a forward or a symbolic trace run, and who enters a context? | the stack |

Plain forwards ask none of this (`torch_inside`).
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch.utils import checkpoint as torchs

from lora_inject.core.functional.noted_hooks import noted_hooks
from lora_inject.core.functional.torch_inside import top_hooks
from lora_inject.private import look_up

_PACKAGE = __name__.partition(".")[0]
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR

_node = look_up("torch._C._current_autograd_node")
_graph_task = look_up("torch._C._current_graph_task_id")
_TORCH_TELLS = look_up("torch._C._autograd._top_saved_tensors_default_hooks") is not None
_push_hooks = look_up("torch._C._autograd._push_saved_tensors_default_hooks")
_pop_hooks = look_up("torch._C._autograd._pop_saved_tensors_default_hooks")
_forward_ad_is_on = look_up("torch._C._is_fwd_grad_enabled")


def in_backward() -> bool:
    """Whether autograd runs a backward pass in the calling thread."""
    if _graph_task is not None:
        return _graph_task() != -1  # type: ignore[no-any-return]
    return _node is not None and _node() is not None


def running_node() -> int | None:
    """Return the number of the node whose backward runs, by the order in which nodes were made.

    If this torch does not tell, it counts as the first of all.
    """
    if _node is None:
        return 0 if in_backward() else None
    node: Any = _node()
    return None if node is None else getattr(node, "_sequence_nr", int)()


def saving_hooks() -> Any:
    """Return the innermost hooks on tensors that autograd saves, `(pack, unpack)`, or None."""
    if torch.compiler.is_dynamo_compiling():  # it may compile this alone; a trace may ask
        return None
    return top_hooks(False)


# ---------------------------------------------------------------------------------- checkpoints
#
# Both modes of `torch.utils.checkpoint` keep the function that they will run again in an object.
# While code runs inside, this object can be found: in the non-reentrant mode through its hook on
# saved tensors, in the reentrant mode on the stack, because it is an autograd Function.


class RunningCheckpoint:
    """One running checkpoint: the object that keeps its function, and the attribute it is in."""

    __slots__ = ("_holder", "_name")

    def __init__(self, holder: Any, name: str) -> None:
        self._holder = holder
        self._name = name

    @property
    def function(self) -> Any:
        """The function that runs again in the backward."""
        return getattr(self._holder, self._name)

    @function.setter
    def function(self, function: Any) -> None:
        setattr(self._holder, self._name, function)


def innermost_checkpoint() -> RunningCheckpoint | None:
    """Return the checkpoint that the innermost hooks on saved tensors belong to, None for others.

    It costs little where there are no hooks. Reentrant checkpoints have none.
    """
    hooks = saving_hooks()
    return None if hooks is None else _of_hook(hooks[0])


def checkpoints() -> Iterator[RunningCheckpoint]:
    """Yield the checkpoints that the caller runs in, of both modes."""
    for pack in _pack_hooks():
        checkpoint = _of_hook(pack)
        if checkpoint is not None:
            yield checkpoint
    for call in reentrant_calls():
        yield RunningCheckpoint(call.f_locals["ctx"], "run_function")


def runs_in_checkpoint() -> bool:
    """Whether the caller runs inside a checkpointed function."""
    return next(checkpoints(), None) is not None


def reentrant_calls() -> list[FrameType]:
    """Return the calls of `CheckpointFunction.forward` on the stack, the innermost first."""
    # Only in the forward of an autograd Function is this off, and in inference mode.
    if torch.is_inference_mode_enabled() or (_forward_ad_is_on and _forward_ad_is_on()):
        return []
    code = torchs.CheckpointFunction.forward.__code__
    frame: FrameType | None = sys._getframe(1)
    calls = []
    while frame is not None:
        if frame.f_code is code:
            calls.append(frame)
        frame = frame.f_back
    return calls


def reentrant_inputs() -> Iterable[Any] | None:
    """Return the inputs of the innermost reentrant checkpoint, None outside of one."""
    calls = reentrant_calls()
    return calls[0].f_locals.get("args", ()) if calls else None


def _pack_hooks() -> list[Any]:
    """Return the hooks on saved tensors, the innermost first: torch shows only that one."""
    if not _TORCH_TELLS:
        return [pack for pack, _ in noted_hooks()]
    if _push_hooks is None or _pop_hooks is None:
        innermost = saving_hooks()
        return [] if innermost is None else [innermost[0]]
    pairs = []
    while (pair := saving_hooks()) is not None:
        pairs.append(pair)
        _pop_hooks()
    for pair in reversed(pairs):
        _push_hooks(*pair)
    return [pack for pack, _ in pairs]


def _of_hook(pack: Any) -> RunningCheckpoint | None:
    """Return the non-reentrant checkpoint that a hook belongs to."""
    if getattr(pack, "__module__", "") != "torch.utils.checkpoint":
        return None
    kind = look_up("torch.utils.checkpoint._CheckpointFrame")
    for cell in pack.__closure__ or ():
        if kind is not None and isinstance(cell.cell_contents, kind):
            return RunningCheckpoint(cell.cell_contents, "recompute_fn")
    return None


# -------------------------------------------------------------------------------------- forwards


def in_forward() -> bool:
    """Whether a module is being called, as far as the stack of the calling thread tells."""
    if torch.compiler.is_compiling():  # what is compiled is a forward
        return True
    return _runs(getattr(torch.nn.Module, "_call_impl", None))


def _runs(function: Any) -> bool:
    """Whether the calling thread runs a function, which None never is."""
    return _frame_of(getattr(function, "__code__", None)) is not None


def _frame_of(code: CodeType | None) -> FrameType | None:
    """Return the innermost frame of the calling thread that runs some code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def module_calling(code: CodeType) -> str:
    """Return the name of the module whose code called the innermost running function of a code."""
    frame = _frame_of(code)
    caller = None if frame is None else frame.f_back
    return "" if caller is None else caller.f_globals.get("__name__", "")


def in_symbolic_trace() -> bool:
    """Whether torch.fx.symbolic_trace runs what calls this, as far as the stack tells."""
    return not torch.compiler.is_compiling() and _runs(torch.fx.Tracer.trace)


# ------------------------------------------------------------------------------------- contexts


def entering_code() -> int:
    """Return the flags of the code that enters a context: `inspect.CO_GENERATOR` and the like.

    That is the innermost frame outside of this package, of contextlib, and of generators that
    contextlib runs as context managers.
    """
    frame = sys._getframe(1)
    while (back := frame.f_back) is not None:
        name = frame.f_globals.get("__name__", "")
        managed = frame.f_code.co_flags & _GENERATOR and back.f_globals is contextlib.__dict__
        if name != "contextlib" and name.partition(".")[0] != _PACKAGE and not managed:
            break
        frame = back
    return frame.f_code.co_flags
