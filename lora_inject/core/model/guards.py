"""What must hold around a verb because another library is there: asked here, known elsewhere.

A guard is a module that knows a library. It has any of these functions, and what it lacks, it has
nothing to say about:

- `before_VERB(...)` raises where the verb would go wrong, before anything of ours is changed; it
  may bring weights together that the verb has to see whole;
- `after_VERB(...)` does what the library needs after it, inside of what is undone if it fails;
- further ones are questions, such as `sharded_by(tensor)`.

Why a library stands against a plan is yielded by functions of its file (`reasons_of_libraries`).
Only the guards of libraries that this process has loaded are imported and asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from lora_inject.core.layers.survey import Survey
from lora_inject.core.spec.plan import Plan
from lora_inject.core.spec.rooms import room, standing_at


def before(verb: str, *about: Any) -> None:
    """Let each guard refuse a verb.

    Raises:
        LayerError: A library that is there would make it wrong.
    """
    for check in functions(f"before_{verb}"):
        check(*about)


def after(verb: str, *about: Any) -> None:
    """Let each guard do what its library needs after a verb."""
    for follow in functions(f"after_{verb}"):
        follow(*about)


def functions(name: str) -> Iterator[Callable[..., Any]]:
    """Yield the function of this name of each guard that has it."""
    for guard in room("libraries").guards():
        if (function := getattr(guard, name, None)) is not None:
            yield function


def reasons_of_libraries(
    survey: Survey, plan: Plan, *, leave_new: bool
) -> Iterator[tuple[str, str]]:
    """Yield the problem and the remedy of each thing in a plan that a library stands against."""
    for reasons in room("libraries").against_plans():
        yield from standing_at(reasons)(survey, plan, leave_new=leave_new)


def this_process_writes(survey: Survey) -> bool:
    """Return whether this process writes a model's files: one of several with shards."""
    return all(ask(survey) for ask in functions("writes_here"))


def holder_of_shards(tensor: Tensor) -> str | None:
    """Return what holds only a part of a tensor in this process, None for a whole tensor."""
    answers = (ask(tensor) for ask in functions("sharded_by"))
    return next((how for how in answers if how is not None), None)
