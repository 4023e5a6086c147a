"""Why a lasting change of adapters cannot be made now."""

from __future__ import annotations

from lora_inject.core.functional.torch_stack import in_backward, runs_in_checkpoint
from lora_inject.errors import StateError


def called_in_context(asked: str, *, inside: bool) -> StateError:
    """Return the error of a change in a context, or while another thread or task is in one."""
    whose = "inside" if inside else "while another thread or task is inside"
    problem = f"it was called {whose} disabled() or routed(), whose end would undo it"
    return StateError(asked, problem, "Leave the context first")


def check_no_backward(asked: str) -> None:
    """Raise if the caller runs in a backward pass or in a checkpoint."""
    if in_backward() or runs_in_checkpoint():
        problem = "it was called inside a checkpointed function or a backward pass"
        raise StateError(asked, problem, "Call it outside, or use disabled() or routed() inside")
