"""What is asked of the inner side of torch: who watches a forward, and does a backward run.

The rest of what only torch's inner side or Python's stack can say is asked in `torch_stack`. Each
function of both has a test that asserts its positive finding, so that a new torch fails loudly.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from lora_inject.private import look_up

F = TypeVar("F", bound=Callable[..., Any])
Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]
"""What packs and unpacks tensors that autograd saves."""

# ------------------------------------------------------------------------------------- tracers


_transforms = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_n_modes = torch._C._len_torch_dispatch_stack


def in_trace() -> bool:
    """Whether `torch.jit.trace` records: sizes are tensors then."""
    return not is_compiling() and _tracing_state() is not None


def is_watched() -> bool:
    """Whether functorch, `torch.jit.trace` or forward-mode AD is active; compiling is not asked."""
    return _transforms() or _tracing_state() is not None or forward_ad._current_level >= 0


def runs_plainly() -> bool:
    """Whether nothing compiles, traces, transforms or records what is computed.

    A dispatch mode records, and may keep what an operation returns: selective activation
    checkpointing (`create_selective_checkpoint_contexts` of torch) hands it out again in the
    backward. An update that is added in place to a kept product would be in it already when the
    recomputation adds it again. So a result is written to only where no mode could keep it.
    """
    return not is_compiling() and not is_watched() and _n_modes() == 0


@contextlib.contextmanager
def resolving() -> Iterator[None]:
    """Let operations see conjugated and negated operands as they are, as outside of a dispatch.

    Inside of `__torch_dispatch__` torch leaves out what resolves them, for kernels too: what
    conjugates by itself, as `torch.linalg.pinv` and `torch.fft.hfft2` do, got other numbers.
    """
    keys = torch._C.DispatchKey
    exclude = torch._C._SetExcludeDispatchKeyGuard
    with exclude(keys.Conjugate, False), exclude(keys.Negative, False):
        yield


def version_of(t: torch.Tensor) -> int:
    """Return a number that writes to a tensor change; it stays 0 where torch counts none."""
    return 0 if t.is_inference() else t._version


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


# Only inside the forward of an autograd Function, which a backward may run again, torch turns
# forward-mode AD off, and in inference mode. As functions of C these are asked in each forward.
differentiates_forward = torch._C._is_fwd_grad_enabled
in_inference = torch.is_inference_mode_enabled


_top_hooks = look_up("torch._C._autograd._top_saved_tensors_default_hooks")  # from torch 2.8 on


def in_backward() -> bool:
    """Whether autograd runs a backward pass in the calling thread."""
    return torch._C._current_graph_task_id() != -1


def saving_hooks() -> Hooks | None:
    """Return the innermost hooks on tensors that autograd saves, `(pack, unpack)`, or None."""
    if _top_hooks is None or torch.compiler.is_dynamo_compiling():  # it may compile this alone
        return None
    hooks: Hooks | None = _top_hooks(False)
    return hooks


_PACKAGE = __name__.partition(".")[0]


def in_forward() -> bool:
    """Whether a module is being called, as far as the stack of the calling thread tells."""
    if torch.compiler.is_compiling():  # what is compiled is a forward
        return True
    call = getattr(torch.nn.Module, "_call_impl", None)
    return _frame_of(getattr(call, "__code__", None)) is not None


def _frame_of(code: CodeType | None) -> FrameType | None:
    """Return the innermost frame of the calling thread that runs some code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def module_calling(code: CodeType) -> str:
    """Return the name of the module whose code called the innermost running function of a code."""
    frame = _frame_of(code)
    return _module_of(None if frame is None else frame.f_back)


def coroutine_enters() -> bool:
    """Whether a coroutine enters a context, which others may interrupt.

    That is the innermost frame outside of this package, of contextlib, and of generators that
    contextlib runs as context managers.
    """
    frame = sys._getframe(1)
    while (back := frame.f_back) is not None:
        name, is_generator = _module_of(frame), frame.f_code.co_flags & inspect.CO_GENERATOR
        managed = is_generator and back.f_globals is contextlib.__dict__
        if name != "contextlib" and name.partition(".")[0] != _PACKAGE and not managed:
            break
        frame = back
    coroutine = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
    return bool(frame.f_code.co_flags & coroutine)


def _module_of(frame: FrameType | None) -> str:
    return "" if frame is None else frame.f_globals.get("__name__", "")
