"""Activation checkpoints: the function that runs again in backward, under its forward's selection.

The selection may change between a forward and its backward: a reference model's forward under
`disabled` comes between them in every step of DPO. So while a layer runs inside a checkpoint, the
function that the checkpoint keeps is wrapped. The wrapper enters the selection of the forward
first, in whatever thread autograd runs it.

In a compiled graph no Python code of this package runs: `compiled.torch_checkpoints` wraps such
functions when their checkpoint begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lora_inject.core.functional.torch_stack import (
    checkpoints,
    in_backward,
    innermost_checkpoint,
    reentrant_calls,
    reentrant_inputs,
    running_node,
    saving_hooks,
)
from lora_inject.core.layers.contexts import in_context
from lora_inject.core.layers.selected import ENTERED
from lora_inject.errors import LayerError, StateError

Before = tuple[Mapping[str, int], Mapping[str, float]]
"""What `Selection.versions` and `Selection.merged` were when a checkpoint began."""


class Recomputed:
    """A checkpointed function that runs under the selections of its forward.

    Attributes:
        selected: Who took part, of each selection, when the checkpoint began.
        compiled: The same as compiled code saw it, for layers that may run in a graph.
        before: For each selection which values its adapters had, and what was merged.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.selected: dict[Any, Any] = {}
        self.compiled: dict[Any, Any] = {}
        self.before: dict[Any, Before] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function."""
        for selection, selected in {**self.compiled, **self.selected}.items():
            _check_recomputable(selection, selected, self.before[selection])
        with in_context({**self._changed(), **self.selected}, recomputes=True):
            return self.function(*args, **kwargs)

    def _changed(self) -> Mapping[Any, Any]:
        """Return who took part in graphs, where it is another now: else a graph is made again."""
        return {one: s for one, s in self.compiled.items() if one.of_thread() is not s}

    def note(self, selection: Any, selected: Any, *, compiled: bool = False) -> None:
        """Note who takes part, unless it is known: what was noted first was in force."""
        (self.compiled if compiled else self.selected).setdefault(selection, selected)
        self.before.setdefault(selection, (selection.versions, selection.merged))


def _check_recomputable(selection: Any, selected: Any, before: Before) -> None:
    """Check that the adapters of a checkpointed forward are still there, with their values."""
    for what, verb in _changes_since(selection, selected, before):
        raise StateError(
            "backward through a checkpoint",
            f"{what} since its forward, which is to be recomputed",
            f"Run the backward before {verb}",
        )


def _changes_since(selection: Any, selected: Any, before: Before) -> Iterator[tuple[str, str]]:
    versions, merged = before
    if merged != selection.merged:
        yield "the model was merged or unmerged", "merge() or unmerge()"
    for name in selected.names:
        if name not in selection.versions:
            yield f"adapter {name!r} was ejected", "eject()"
        elif selection.versions[name] != versions.get(name):
            yield f"adapter {name!r} got other values", "swap_adapter()"


def recomputed(function: Any) -> Recomputed:
    """Return a checkpointed function in its wrapper."""
    return function if isinstance(function, Recomputed) else Recomputed(function)


def remember(selection: Any, selected: Any) -> None:
    """Let the checkpoints that the caller runs in be recomputed under `selected`.

    Raises:
        StateError: A forward runs in a backward, and may compute something else than it did.
    """
    if in_backward():
        _check_unchanged(selection)
    is_new = saving_hooks() is not None and not _is_known(selection)
    if not is_new and not reentrant_calls():
        return
    for checkpoint in checkpoints():
        wrapped = recomputed(checkpoint.function)
        wrapped.note(selection, selected)
        checkpoint.function = wrapped


def _check_unchanged(selection: Any) -> None:
    """Check a forward in a backward that no checkpoint of torch's recomputes."""
    if any(context.recomputes and selection in context.selected for context in ENTERED.get()):
        return
    node = running_node()
    if node is not None and node < selection.changed:
        raise StateError(
            "a forward inside a backward pass",
            "the selection or an adapter's values changed since the forward that it may recompute",
            "Use torch.utils.checkpoint, or change neither from forward to backward",
        )


def _is_known(selection: Any) -> bool:
    """Whether the innermost checkpoint remembers who takes part; those around it then do, too."""
    checkpoint = innermost_checkpoint()
    function = None if checkpoint is None else checkpoint.function
    return isinstance(function, Recomputed) and selection in function.selected


def check_live_checkpoint() -> None:
    """Raise where the caller runs in a reentrant checkpoint that will ask for no gradient."""
    inputs = reentrant_inputs()
    if inputs is None or any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        return
    raise LayerError(
        "training an adapter inside a reentrant checkpoint",
        "no input of the checkpoint requires a gradient, so none would reach the adapter",
        "Checkpoint with use_reentrant=False, or let the embeddings' output require a gradient "
        "(model.enable_input_require_grads(), if there is one); use model.eval() to only evaluate",
    )
