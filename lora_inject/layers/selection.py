"""Which adapters take part: one small object that all layers of an injected root share.

The selection is a value, `State`, held in one cell, `Selection`. Every layer reads the
cell, so switching costs the same for ten sites as for ten thousand.

Activation checkpointing runs a forward a second time, inside the backward, and that second run must
see the selection of *its* forward, whatever was activated since. Autograd numbers the nodes of its
graph in the order in which forwards create them. So the cell keeps a short log of its changes by
that number, and the node whose backward asks for the recomputation tells, by its own number, which
state was in force. This holds for both modes of `torch.utils.checkpoint`.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lora_inject.errors import StateError
from lora_inject.layers.checkpointing import reentrant_backwards
from lora_inject.layers.state_dict import Loading

# How many changes of the selection a pending backward may look back on.
LOG_LENGTH = 4096

_NUMBERS: dict[str, int] = {}


def number(adapter: str) -> int:
    """Return the number that stands for an adapter's name in tensors, the same in all models."""
    return _NUMBERS.setdefault(adapter, len(_NUMBERS))


def _as_tensor(pairs: list[tuple[int, float]]) -> Tensor:
    """Return `(n, 2)`, float64: a plain tensor, whatever mode the caller is in.

    It outlives the mode: a fake tensor would be in the way of later graphs, and one of inference
    mode could not be saved for a backward.
    """
    if torch.is_inference_mode_enabled() or torch._C._len_torch_dispatch_stack():
        with torch.inference_mode(False), _disable_current_modes():
            return _as_tensor(pairs)
    return torch.tensor(pairs, dtype=torch.float64, device="cpu").view(-1, 2)


@dataclass(frozen=True)
class State:
    """One selection of adapters.

    Attributes:
        active: `(name, weight)` of each active adapter; empty for the plain base.
        rows: For `routed`: the adapter of each row of the batch, None for the base; else None.
        repeat: How many consecutive rows of an input share one entry of `rows` (beams).
        merged: Whether the weights hold a merged adapter, and no other may be added.
        choice: The same as a tensor, for compiled graphs, in which a name would be a constant:
            `(n, 2)`, float64 on the CPU; the `number` of each active adapter, or of each row's (-1
            for the base), and its weight.
        routed: Whether there are `rows`.
        kept: What layers keep for the forwards of one `routed`, emptied at its end.
    """

    active: tuple[tuple[str, float], ...] = ()
    rows: tuple[str | None, ...] | None = None
    repeat: int = 1
    merged: bool = False
    choice: Tensor = field(init=False, repr=False, compare=False)
    routed: bool = field(init=False, repr=False, compare=False)
    kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        chosen = self.active
        if self.rows is not None:
            chosen = tuple((name, 1.0) for name in self.rows)  # type: ignore[misc]
        pairs = [(-1 if name is None else number(name), weight) for name, weight in chosen]
        object.__setattr__(self, "choice", _as_tensor(pairs))
        object.__setattr__(self, "routed", self.rows is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy by the names: numbers are of one process."""
        return State, (self.active, self.rows, self.repeat, self.merged)

    @property
    def names(self) -> frozenset[str]:
        """Every adapter that takes part."""
        if self.rows is not None:
            return frozenset(name for name in self.rows if name is not None)
        return frozenset(name for name, _ in self.active)


BASE = State()


class _Timeline:
    """Which state was in force when the autograd node of a given number was made."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.states: list[State] = []
        self.owners: list[int] = []

    def note(self, state: State, owner: int = -1) -> None:
        """Nodes made from here on, by the recomputation `owner` if any, belong to `state`."""
        if self.states and self.states[-1] == state and self.owners[-1] == owner:
            return
        number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        self.numbers.append(number)
        self.states.append(state)
        self.owners.append(owner)
        if len(self.numbers) > LOG_LENGTH:
            del self.numbers[0], self.states[0], self.owners[0]

    def at(self, number: int, owner: int | None = None) -> State | None:
        """Return the state of the node of that number, None where it is not known.

        Args:
            number: The node's number.
            owner: Only what was noted by this recomputation counts, where given.
        """
        index = bisect.bisect_right(self.numbers, number) - 1
        if index < 0 or (owner is not None and self.owners[index] != owner):
            return None
        return self.states[index]


class Selection:
    """The cell that holds the current `State`.

    Attributes:
        state: The state that a forward started now runs under.
        merged: The state that is folded into the weights, or None.
        trained: The adapters that `train_only` named last.
        witness: Where layers note that they took part, while `unreached` listens.
    """

    def __init__(self, state: State = BASE, merged: State | None = None) -> None:
        self.state = state
        self.merged = merged
        self.trained: frozenset[str] = frozenset()
        self.witness: set[tuple[int, str | None]] | None = None
        self._loading: Loading | None = None
        self._log = _Timeline()
        self._thread = threading.get_ident()
        # While a backward recomputes forwards: the states of nodes made by the recomputation, and
        # the contexts that the recomputed function itself has entered.
        self._replay = _Timeline()
        self._replay_task = -1
        self._entered: list[State] = []
        self._region: Any = None
        self._gone: dict[str, int] = {}
        self._n_contexts = 0

    def loading(self, missing_keys: list[str]) -> Loading:
        """Return what is known of the call of `load_state_dict` that collects `missing_keys`."""
        if self._loading is None or self._loading.missing_keys is not missing_keys:
            self._loading = Loading(missing_keys)
        return self._loading

    def current(self) -> State:
        """Return the state that the running forward belongs to.

        Raises:
            StateError: A checkpointed forward is recomputed and its state is not known any more.
        """
        if torch.compiler.is_compiling():
            return self.state
        task = torch._C._current_graph_task_id()
        if task != -1:
            return self._recall(task)
        if self._replay.numbers:
            self._replay = _Timeline()
        if self._region is not None:
            self._refuse_nested_checkpoint()
        return self.state

    def replace(self, state: State) -> None:
        """Make `state` current from here on.

        Raises:
            StateError: Called from inside a context, a checkpointed function or a backward pass.
        """
        self.check_settled("a change of adapters")
        self._note_change(state)
        self.state = state

    def check_settled(self, asked: str) -> None:
        """Check that a lasting change can be made now.

        Raises:
            StateError: A context, a checkpointed function or a backward pass is running, which
                would undo the change or see half of it.
        """
        if self._n_contexts:
            raise StateError(
                asked,
                "it was called inside disabled() or routed(), whose end would undo it",
                "Leave the context first",
            )
        if torch._C._current_graph_task_id() != -1 or _checkpoint_hook() is not None:
            raise StateError(
                asked,
                "it was called inside a checkpointed function or a backward pass",
                "Call it outside, or use disabled() or routed() inside",
            )

    @contextmanager
    def within(self, state: State) -> Iterator[None]:
        """Run the body under `state`, and restore what was there, also after an exception."""
        task = torch._C._current_graph_task_id()
        if task != -1:
            with self._within_recomputation(task, state):
                yield
            return
        before, region = self.state, self._region
        hook = _checkpoint_hook()
        if hook is None:
            self._note_change(state)
        else:
            # The recomputation of this checkpoint will enter this context by itself, and must
            # start outside of it: nothing is logged.
            self._region = hook
        self.state = state
        self._n_contexts += 1
        try:
            yield
        finally:
            self._n_contexts -= 1
            self.state, self._region = before, region
            if hook is None:
                self._note_change(before)

    @contextmanager
    def _within_recomputation(self, task: int, state: State) -> Iterator[None]:
        outside = self._recall(task)
        recomputed = reentrant_backwards()
        owner = recomputed[-1] if recomputed else -1
        self._entered.append(state)
        self._replay.note(state, owner)
        try:
            yield
        finally:
            self._entered.pop()
            self._replay.note(outside, owner)

    def _note_change(self, state: State) -> None:
        if not self._log.numbers:
            self._log.note(self.state)
            self._log.numbers[0] = 0
        self._log.note(state)
        self._replay = _Timeline()

    def _recall(self, task: int) -> State:
        """Return the state of the forward that is being recomputed in the given graph task."""
        if self._entered:
            return self._entered[-1]
        if len(self._log.numbers) <= 1:  # neighbours in the log differ: never changed
            return self.state
        node = torch._C._current_autograd_node()
        if node is None:
            return self.state
        same_thread = threading.get_ident() == self._thread
        if not same_thread and self._replay.numbers and task != self._replay_task:
            raise StateError(
                "backward through a reentrant checkpoint inside another one",
                "the selection changed since its forward, and the two cannot be told apart here",
                "Use use_reentrant=False, or keep one selection from forward to backward",
            )
        number = node._sequence_nr()
        recomputed = reentrant_backwards()
        owner = recomputed[-1] if recomputed else -1
        # A checkpoint inside a reentrant one was made by the recomputation of the outer one.
        nested = len(recomputed) > 1
        found = self._replay.at(number, owner if nested else None) if same_thread else None
        if found is None:
            found = self._log.at(owner if nested else number)
        if found is None:
            raise StateError(
                "backward through a checkpoint",
                f"the selection changed more than {LOG_LENGTH} times since its forward",
                "Run the backward sooner",
            )
        if found.merged != self.state.merged:
            raise StateError(
                "backward through a checkpoint",
                "the model was merged or unmerged since its forward, which is to be recomputed",
                "Run the backward before merge() or unmerge()",
            )
        if not self._replay.numbers:
            self._replay_task = task
        self._replay.note(found, owner)
        self._refuse_ejected(found, owner if nested else number)
        return found

    def forget(self, names: Iterable[str]) -> None:
        """Note that adapters are gone, for forwards that are still to be recomputed."""
        number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        self._gone.update(dict.fromkeys(names, number))

    def _refuse_ejected(self, found: State, number: int) -> None:
        for name in found.names:
            if number < self._gone.get(name, -1):
                raise StateError(
                    "backward through a checkpoint",
                    f"adapter {name!r} was ejected since its forward, which is to be recomputed",
                    "Run the backward before eject()",
                )

    def _refuse_nested_checkpoint(self) -> None:
        if _checkpoint_hook() not in (None, self._region):
            raise StateError(
                "routed() or disabled() inside a checkpointed function",
                "another checkpoint begins inside the context, and would be recomputed outside it",
                "Enter the context outside both checkpoints, or inside the inner one",
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy carries: the state, not the log of a graph that stays behind."""
        return {"state": self.state, "merged": self.merged, "trained": self.trained}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        Selection.__init__(self, saved["state"], saved["merged"])
        self.trained = saved.get("trained", frozenset())


def _checkpoint_hook() -> Any:
    """Return the pack hook of the innermost non-reentrant checkpoint that is running, or None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None or "checkpoint" not in getattr(hooks[0], "__module__", ""):
        return None
    return hooks[0]
