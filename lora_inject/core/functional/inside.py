"""What only the inner side of torch, or Python's stack, can say: the one file that asks it.

| question | asked of |
|---|---|
| does a tracer or a transform watch? | `torch._C`, `forward_ad` |
| does a backward run, and which node? | autograd's engine |
| which checkpoints does the caller run in? | hooks on saved tensors, the stack |
| who enters a context? | the stack |

Each function has a test that asserts its positive finding, so that a new torch fails loudly. What
happens where a torch lacks a name stands in `private_names.NAMES`.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from lora_inject.private import look_up

F = TypeVar("F", bound=Callable[..., Any])
_PACKAGE = __name__.partition(".")[0]
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR

# ------------------------------------------------------------------------------------- tracers


_transforms = look_up("torch._C._are_functorch_transforms_active")
_tracing_state = look_up("torch._C._get_tracing_state")
_level = look_up("torch.autograd.forward_ad._current_level")  # a number, which changes
_tells = None not in (_transforms, _tracing_state, _level)


def in_trace() -> bool:
    """Whether `torch.jit.trace` records: sizes are tensors then."""
    if torch.compiler.is_compiling() or _tracing_state is None:
        return False
    return _tracing_state() is not None


def is_watched(*, unknown: bool = True) -> bool:
    """Whether functorch, `torch.jit.trace` or forward-mode AD is active; compiling is not asked.

    Args:
        unknown: What to return where this torch does not tell.
    """
    if not _tells:
        return unknown
    return _transforms() or _tracing_state() is not None or forward_ad._current_level >= 0


_n_modes = look_up("torch._C._len_torch_dispatch_stack")


def is_recorded() -> bool:
    """Whether a dispatch mode sees each operation, and may keep what it returns.

    Selective activation checkpointing (`create_selective_checkpoint_contexts` of torch) keeps the
    results of some operations so, and hands them out again in the backward. An update that is added
    in place to a kept product would be in it already when the recomputation adds it again. So a
    result is written to only where no mode could keep it, and nowhere if this torch does not tell.
    """
    return _n_modes is None or _n_modes() > 0


def runs_plainly() -> bool:
    """Whether nothing compiles, traces, transforms or records what is computed: all of the above.

    In one function, because it is asked for each token of each layer.
    """
    if torch.compiler.is_compiling() or not _tells or _n_modes is None:
        return False
    transformed = _transforms() or _tracing_state() is not None or forward_ad._current_level >= 0
    return not transformed and _n_modes() == 0


def constant_in_graphs(function: F) -> F:
    """Let dynamo run a function while it traces, and keep what it returned as a constant.

    `torch.compiler.assume_constant_result` does the same, and imports dynamo when it decorates.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def forget_graphs() -> None:
    """Have torch compile again: before 2.13 a graph does not see that a parameter trains now."""
    if _TORCH < (2, 13) and "torch._dynamo" in sys.modules:
        torch.compiler.reset()


# ------------------------------------------------------------------------------------ backwards


_graph_task = look_up("torch._C._current_graph_task_id")
_node = look_up("torch._C._current_autograd_node")
_number = look_up("torch.autograd._get_sequence_nr")
_top_hooks = look_up("torch._C._autograd._top_saved_tensors_default_hooks")
_push_hooks = look_up("torch._C._autograd._push_saved_tensors_default_hooks")
_pop_hooks = look_up("torch._C._autograd._pop_saved_tensors_default_hooks")
_forward_ad_is_on = look_up("torch._C._is_fwd_grad_enabled")


class _Entered(threading.local):
    """The hooks on saved tensors that the calling thread has entered, the innermost last."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Any, Any]] = []


_ENTERED = _Entered()


def note_saving_hooks() -> None:
    """Note from now on who enters hooks on saved tensors, which torch tells since 2.8.

    What was entered before is not known, nor what C++ code enters.
    """
    enter, leave = saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__

    def entering(self: Any) -> None:
        enter(self)
        _ENTERED.pairs.append((self.pack_hook, self.unpack_hook))

    def leaving(self: Any, *raised: object) -> None:
        if _ENTERED.pairs:
            _ENTERED.pairs.pop()
        leave(self, *raised)

    saved_tensors_hooks.__enter__ = entering  # type: ignore[method-assign]
    saved_tensors_hooks.__exit__ = leaving  # type: ignore[method-assign]


if _top_hooks is None:
    note_saving_hooks()


def in_backward() -> bool:
    """Whether autograd runs a backward pass in the calling thread."""
    if _graph_task is not None:
        return _graph_task() != -1  # type: ignore[no-any-return]
    return _node is not None and _node() is not None


def may_recompute() -> bool:
    """Whether the caller may run in a backward pass or in a checkpoint; False in most forwards.

    It is asked in each forward of each layer, and costs a quarter of a microsecond. True where this
    torch does not tell.
    """
    if torch.compiler.is_compiling():  # dynamo may compile this function alone
        return False
    hooks = _ENTERED.pairs if _top_hooks is None else _top_hooks(False)
    if hooks or _forward_ad_is_on is None or _graph_task is None:
        return True
    # The last is off in the forward of an autograd Function, which a reentrant checkpoint is.
    if _graph_task() != -1:
        return True
    return not _forward_ad_is_on() and not torch.is_inference_mode_enabled()


def running_node() -> int | None:
    """Return the number of the node whose backward runs, by the order in which nodes were made.

    If this torch does not tell, it counts as the first of all.
    """
    if _node is None:
        return 0 if in_backward() else None
    node: Any = _node()
    return None if node is None else getattr(node, "_sequence_nr", int)()


def next_node() -> int:
    """Return the number that autograd gives to the next node of this thread.

    If this torch does not tell, it counts as the last of all.
    """
    return sys.maxsize if _number is None else int(_number())


def saving_hooks() -> Any:
    """Return the innermost hooks on tensors that autograd saves, `(pack, unpack)`, or None."""
    if torch.compiler.is_dynamo_compiling():  # it may compile this alone; a trace may ask
        return None
    if _top_hooks is None:
        return _ENTERED.pairs[-1] if _ENTERED.pairs else None
    return _top_hooks(False)


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
    code = _checkpointing().CheckpointFunction.forward.__code__
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


def _checkpointing() -> Any:
    """Return torch.utils.checkpoint: imported by whoever checkpoints, and by nobody else."""
    return sys.modules.get("torch.utils.checkpoint") or _imported()


def _imported() -> Any:
    import torch.utils.checkpoint

    return torch.utils.checkpoint


def _pack_hooks() -> list[Any]:
    """Return the hooks on saved tensors, the innermost first: torch shows only that one."""
    if _top_hooks is None:
        return [pack for pack, _ in reversed(_ENTERED.pairs)]
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


def caller_of(code: CodeType) -> FrameType | None:
    """Return the frame that called the innermost running function with this code."""
    frame = _frame_of(code)
    return None if frame is None else frame.f_back


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
