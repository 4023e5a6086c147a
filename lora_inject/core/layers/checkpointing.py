"""Activation checkpoints: the function that runs again in backward, under its forward's selection.

Both modes of `torch.utils.checkpoint` keep the function that they will run again in an object.
While a layer runs inside, this object can be found: in the non-reentrant mode through its hook on
saved tensors, in the reentrant mode on the call stack, because it is an autograd Function. The kept
function is wrapped, so that it first enters the selection, in any thread.

In a compiled graph no Python code of this package runs. So after a layer was compiled, every
checkpoint stores the states of all selections when it begins (`watch_checkpoints`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch.utils.checkpoint import CheckpointFunction, _CheckpointFrame

from lora_inject.core.layers.contexts import within
from lora_inject.errors import LayerError

T = TypeVar("T")
_REENTRANT = CheckpointFunction.forward.__code__
_top = torch._C._autograd._top_saved_tensors_default_hooks


class Recomputed:
    """A checkpointed function that runs under the selections of its forward.

    Attributes:
        states: The state of each selection when the checkpoint began.
        compiled: The same as compiled code saw it, for layers that may run in a graph.
        values: For each selection what `Selection.values` was then.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.states: dict[Any, Any] = {}
        self.compiled: dict[Any, Any] = {}
        self.values: dict[Any, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function."""
        # Under a state that is in force already a graph would be compiled again.
        changed = {s: state for s, state in self.compiled.items() if s.of_thread() is not state}
        for selection, state in {**self.compiled, **self.states}.items():
            selection.check_recomputable(state, self.values[selection])
        with within({**changed, **self.states}, recomputes=True):
            return self.function(*args, **kwargs)


SELECTIONS: WeakSet[Any] = WeakSet()
"""Every selection of the process."""


def alive(members: WeakSet[T]) -> list[T]:
    """Return the members of a weak set, to which other threads may add meanwhile."""
    references = members.data.copy()  # type: ignore[attr-defined]  # in one step
    return [member for reference in references if (member := reference()) is not None]


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def watch_checkpoints() -> bool:
    """Let checkpoints remember for compiled layers; it runs while a graph is traced, not in it."""
    _watch()
    _replace_functions(_pack_hooks(), _reentrant_calls(), _as_compiled)
    return True


def _replace_functions(
    hooks: Iterable[Any], calls: Iterable[FrameType], change: Callable[[Any], Recomputed]
) -> None:
    """Replace the function of each checkpoint, known by its hook or its call on the stack."""
    for frame in filter(None, map(_frame_of, hooks)):
        frame.recompute_fn = change(frame.recompute_fn)
    for call in calls:
        ctx = call.f_locals["ctx"]
        ctx.run_function = change(ctx.run_function)


@functools.cache
def _watch() -> None:
    """Wrap the functions of all checkpoints that begin from now on."""
    begin, apply = _CheckpointFrame.__init__, CheckpointFunction.apply

    @functools.wraps(begin)
    def beginning(self: Any, recompute_fn: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, _as_compiled(recompute_fn), *args, **kwargs)

    def applying(run_function: Any, *args: Any) -> Any:
        return apply(_as_compiled(run_function), *args)  # type: ignore[no-untyped-call]

    _CheckpointFrame.__init__ = beginning  # type: ignore[method-assign]
    CheckpointFunction.apply = staticmethod(applying)  # type: ignore[method-assign]


def _as_compiled(function: Any) -> Recomputed:
    """Return a checkpointed function that runs again under what compiled code sees now."""
    wrapped = function if isinstance(function, Recomputed) else Recomputed(function)
    for selection in alive(SELECTIONS):
        wrapped.compiled.setdefault(selection, selection.of_thread())
        wrapped.values.setdefault(selection, selection.values)
    return wrapped


def remember(selection: Any, state: Any) -> None:
    """Let the checkpoints that the caller runs in be recomputed under `state`.

    A state that was stored earlier for a checkpoint stays: it was in force when the checkpoint
    began.
    """
    hooks = _top(False)
    frame = None if hooks is None else _frame_of(hooks[0])
    known = getattr(frame, "recompute_fn", None)
    done = hooks is None or (isinstance(known, Recomputed) and selection in known.states)
    calls = _reentrant_calls()
    if done and not calls:
        return

    def under_state(function: Any) -> Recomputed:
        wrapped = function if isinstance(function, Recomputed) else Recomputed(function)
        wrapped.states.setdefault(selection, state)
        wrapped.values.setdefault(selection, selection.values)
        return wrapped

    _replace_functions(() if done else _pack_hooks(), calls, under_state)


def are_running() -> bool:
    """Whether the caller runs inside a checkpointed function."""
    return any(map(_frame_of, _pack_hooks())) or bool(_reentrant_calls())


def refuse_dead_checkpoint() -> None:
    """Raise where the caller runs in a reentrant checkpoint that will ask for no gradient."""
    calls = _reentrant_calls()
    if not calls:
        return
    inputs = calls[0].f_locals.get("args", ())
    if not any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs):
        raise LayerError(
            "training an adapter inside a reentrant checkpoint",
            "no input of the checkpoint requires a gradient, so none would reach the adapter",
            "Checkpoint with use_reentrant=False, or let the embeddings' output require a gradient "
            "(transformers: model.enable_input_require_grads()); use model.eval() to only evaluate",
        )


def _reentrant_calls() -> Sequence[FrameType]:
    """Return the calls of `CheckpointFunction.forward` on the stack, the innermost first."""
    # Only in the forward of an autograd Function is this off, and in inference mode.
    if torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled():
        return ()
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _REENTRANT:
            found.append(frame)
        frame = frame.f_back
    return found


def _pack_hooks() -> list[Any]:
    """Return the hooks on saved tensors, the innermost first: torch shows only that one."""
    pairs = []
    while (pair := _top(False)) is not None:
        pairs.append(pair)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    for pair in reversed(pairs):
        torch._C._autograd._push_saved_tensors_default_hooks(*pair)
    return [pack for pack, _ in pairs]


def _frame_of(pack: Any) -> Any:
    """Return the non-reentrant checkpoint that a hook belongs to, None where it is another hook."""
    if getattr(pack, "__module__", "") != "torch.utils.checkpoint":
        return None
    cells = (cell.cell_contents for cell in pack.__closure__ or ())
    return next((value for value in cells if isinstance(value, _CheckpointFrame)), None)
