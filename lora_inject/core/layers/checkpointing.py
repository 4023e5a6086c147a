"""Activation checkpoints: a function that runs again in backward, under its forward's selection.

The selection may change between a forward and its backward: a reference model's forward under
`disabled` comes between them in every step of DPO. So while anything has adapters, each checkpoint
of torch notes, when it begins, who takes part, and enters that before its function runs again, in
whatever thread autograd runs it. Compiled layers are switched by it as well.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction, _CheckpointFrame

from lora_inject.core.functional.patches import patch
from lora_inject.core.layers.reading import OWN
from lora_inject.core.layers.selection import (
    SELECTIONS,
    Mix,
    Selected,
    Selection,
    alive,
    in_context,
)
from lora_inject.errors import LayerError, StateError

# Whether (`now`) the caller runs in a reentrant checkpoint no input of which asks for a gradient.
_in_vain = threading.local()


class _Asked(dict[Selection, Selected]):
    """What a context holds that changes nothing, and notes whose layers asked who takes part."""

    def __init__(self) -> None:
        super().__init__()
        self.by: set[object] = set()

    def __contains__(self, selection: object) -> bool:
        self.by.add(selection)
        return False


class Recomputed:
    """A checkpointed function, and who took part when it began, with which values.

    A reentrant checkpoint runs its forward through this object as well: its `first` run.
    """

    def __init__(self, function: Callable[..., Any], *, first: bool) -> None:
        self._function = function
        self._first = first
        self._asked = _Asked()
        self._adds = OWN.adds
        self._then = {selection: selection.taken() for selection in alive(SELECTIONS)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function, again but for the first time."""
        if self._first:
            self._first = False
            return self._run_first(*args, **kwargs)
        before, OWN.adds = OWN.adds, self._adds
        try:
            with in_context(self._changed(), recomputes=True):
                return self._function(*args, **kwargs)
        finally:
            OWN.adds = before

    def _run_first(self, *args: Any, **kwargs: Any) -> Any:
        live = any(isinstance(t, Tensor) and t.requires_grad for t in args)
        around, _in_vain.now = getattr(_in_vain, "now", False), not live
        try:
            with in_context(self._asked, recomputes=True):
                return self._function(*args, **kwargs)
        finally:
            _in_vain.now = around

    def _changed(self) -> dict[Selection, Selected]:
        """Return who took part, where it is another now: else a compiled graph is made again.

        What got its first adapter since then had none.
        """
        then = {s: self._who(s) for s in alive(SELECTIONS)}
        for selection, selected in then.items():
            # A graph asks nobody, nor does a layer whose last adapter was ejected.
            asked = selection in self._asked.by or selection.into_graphs is not None
            if isinstance(selected, _Gone) and asked:
                raise selected.error
        return {s: selected for s, selected in then.items() if s.here() is not selected}

    def _who(self, selection: Selection) -> Selected:
        """Return who took part of a selection; where that is gone, what raises if a layer asks."""
        if selection not in self._then:
            return Mix()
        taken = self._then[selection]
        gone = taken.gone(selection)
        return taken.selected if gone is None else _Gone(*gone)


class _Gone(Selected):
    """Adapters that are not what they were when a checkpoint began.

    Other models of the process may change meanwhile: only a layer that asks is refused.
    """

    names: Mapping[str, float] = MappingProxyType({})

    def __init__(self, problem: str, verb: str) -> None:
        asked = "backward through a checkpoint"
        problem = f"{problem} since its forward, which is to be recomputed"
        self.error = StateError(asked, problem, f"Run the backward before {verb}")

    def forward(self, *_: Any, **__: Any) -> Any:
        """Refuse the forward of a layer."""
        raise self.error

    def read(self, *_: Any, **__: Any) -> Any:
        """Refuse a read of a parameter."""
        raise self.error


def _noting_frame(begin: Callable[..., None]) -> Callable[..., None]:
    """Return what makes a checkpoint that is not reentrant."""

    @functools.wraps(begin)
    def beginning(
        self: object, recompute_fn: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> None:
        begin(self, Recomputed(recompute_fn, first=False), *args, **kwargs)

    return beginning


def _noting_call(apply: Callable[..., Any]) -> Any:
    """Return what runs a reentrant checkpoint; a class derived from torch's is one of its own."""

    def applying(cls: type, run_function: Callable[..., Any], *args: Any) -> Any:
        noted = Recomputed(run_function, first=True) if cls is CheckpointFunction else run_function
        return apply.__func__(cls, noted, *args)  # type: ignore[attr-defined]

    return classmethod(applying)


patch(_CheckpointFrame, "__init__", _noting_frame)
patch(CheckpointFunction, "apply", _noting_call)


def check_live_checkpoint() -> None:
    """Raise where the caller runs in a reentrant checkpoint that will ask for no gradient."""
    if getattr(_in_vain, "now", False):
        raise LayerError(
            "training an adapter inside a reentrant checkpoint",
            "no input of the checkpoint requires a gradient, so none would reach the adapter",
            "Checkpoint with use_reentrant=False, or let the embeddings' output require a gradient "
            "(model.enable_input_require_grads(), if there is one); use model.eval() to only "
            "evaluate",
        )
