"""Which adapters take part: one small object that all layers of an injected root share.

A selection is a value, `State`. The setting of the model stands in its `Selection`, for all
threads; a context of the running thread, task or generator stands over it (`layers.contexts`).
Every layer asks for the state in force, so switching costs the same for any number of sites.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lora_inject.core.layers.checkpointing import (
    SELECTIONS,
    are_running,
    remember,
    watch_checkpoints,
)
from lora_inject.core.layers.contexts import Context, entered, innermost
from lora_inject.core.layers.sending import sent
from lora_inject.core.layers.state_dict import Loading
from lora_inject.errors import StateError


@dataclass(frozen=True)
class State:
    """One selection of adapters."""

    active: tuple[tuple[str, float], ...] = ()  # name and weight of each; empty for the plain base
    # for `routed`: the adapter of each row of the batch, None for the base
    rows: tuple[str | None, ...] | None = None
    repeat: int = 1  # how many consecutive rows of an input share one entry of `rows` (beams)
    # what is folded into the weights, where no other adapter may then be added
    merged: tuple[tuple[str, float], ...] = ()
    routed: bool = field(init=False, repr=False, compare=False)  # whether there are `rows`
    # the names of those that take part: a compiled graph can depend on a single key of a dict
    parts: Mapping[str, None] = field(init=False, repr=False, compare=False)
    numbers: tuple[int, ...] = field(default=(), repr=False, compare=False)  # of those
    # for compiled graphs, in which a name would be a constant: `(n, 2)` on each device, the number
    # of each active adapter, or of each row's (-1 for the base), and its weight
    choices: Mapping[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)
    # for trials: the ranges and the dropout of one pass
    one_pass: Any = field(default=None, repr=False, compare=False)
    alone: bool = False  # whether all `rows` have one adapter, so that weights are read with it
    # what layers keep for one context: rows as tensors
    kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "routed", self.rows is not None)
        names = (name for name, _ in self.chosen if name is not None)
        object.__setattr__(self, "parts", dict.fromkeys(names))

    @property
    def chosen(self) -> tuple[tuple[str | None, float], ...]:
        """Name and weight of each active adapter, or of each row's."""
        return self.active if self.rows is None else tuple((name, 1.0) for name in self.rows)

    def of(self, name: str | None, n: int) -> State:
        """Return the selection of n rows of one adapter by themselves."""
        one = None if self.one_pass is None else self.one_pass.only(name, n)
        return replace(self, rows=(name,) * n, alone=True, one_pass=one)

    def packs(self, x: Tensor) -> bool:
        """Whether the tokens of a layer's input `(1, tokens, ...)` are what `rows` are for."""
        if self.one_pass is None or not self.one_pass.packed or x.dim() < 2:
            return False
        n = len(self.rows or ())
        return x.shape[0] != n and x.shape[1] == n

    def choice_on(self, device: torch.device) -> Tensor:
        """Return the choice on a device."""
        found = self.choices.get(device)
        return next(iter(self.choices.values())).to(device) if found is None else found


BASE = State()


class Selection:
    """What all layers of a root share.

    Attributes:
        state: The setting of the model, which holds where no context does.
        devices: Where adapters are, or were.
        contexts: The contexts of this selection that are open anywhere.
        may_wait: Whether a generator or coroutine holds one of them.
        values: How often the values of each adapter were swapped; a new mapping each time.
    """

    def __init__(self, state: State = BASE) -> None:
        self.state = state
        self.devices: frozenset[torch.device] = frozenset()
        self.contexts: set[Context] = set()
        self.may_wait = False
        self.values: Mapping[str, int] = {}
        self._numbers: dict[str, int] = {}
        self._n_numbered = 0
        self._loading: Loading | None = None
        # A state for the compiled forwards of this thread: dynamo cannot read a context variable.
        self._of_thread = threading.local()
        # Autograd's number of the first node that may be made after the last change.
        self._changed = 0
        SELECTIONS.add(self)

    # ------------------------------------------------------------------------------- adapters

    def number(self, adapter: str) -> int:
        """Return the number that stands for an adapter in tensors; none is used twice."""
        if adapter not in self._numbers:
            self._numbers[adapter] = self._n_numbered
            self._n_numbered += 1
        return self._numbers[adapter]

    def forget(self, adapters: Iterable[str]) -> None:
        """Note that adapters are gone."""
        for name in adapters:
            self._numbers.pop(name, None)

    def prepared(self, state: State) -> State:
        """Return a state with its tensors, which are made once and not in a forward."""
        pairs = [
            (-1 if name is None else self.number(name), weight) for name, weight in state.chosen
        ]
        return replace(
            state,
            numbers=tuple(self.number(name) for name in state.parts),
            choices={device: _as_tensor(pairs, device) for device in self.devices},
        )

    def extend_to(self, device: torch.device) -> None:
        """Note that an adapter is on a device."""
        if device not in self.devices:
            self.devices |= {device}
            self.state = self.prepared(self.state)

    # --------------------------------------------------------------------------------- states

    def current(self) -> State:
        """Return the state that the running forward belongs to."""
        if torch.compiler.is_compiling():  # dynamo may compile this function alone
            return self._of_compiled()
        context = innermost(self)
        state = self.state if context is None else context.states[self]
        if torch._C._current_graph_task_id() != -1:
            self._check_known()
        remember(self, state)
        return state

    def _of_compiled(self) -> State:
        if self.may_wait:
            # dynamo cannot raise our exception: it shows the text, or continues without a graph.
            raise RuntimeError(
                "A coroutine or generator holds routed() or disabled(), and compiled code cannot "
                "tell whose forward it is. Enter the context in a plain function instead."
            )
        watch_checkpoints()
        return self.of_thread()

    def of_thread(self) -> State:
        """Return the state that compiled code sees in this thread."""
        state: State | None = getattr(self._of_thread, "state", None)
        return self.state if state is None else state

    def replace(self, state: State) -> None:
        """Make `state` the setting of the model."""
        self.check_settled("a change of adapters")
        self._note_change()
        self.state = self.prepared(state)

    def check_settled(self, asked: str, *, others: bool = False) -> None:
        """Check that a lasting change can be made now; `others` also in other threads and tasks."""
        inside = any(self in context.states for context in entered() if not context.left)
        if inside or (others and self.contexts):
            whose = "inside" if inside else "while another thread or task is inside"
            raise StateError(
                asked,
                f"it was called {whose} disabled() or routed(), whose end would undo it",
                "Leave the context first",
            )
        if torch._C._current_graph_task_id() != -1 or are_running():
            raise StateError(
                asked,
                "it was called inside a checkpointed function or a backward pass",
                "Call it outside, or use disabled() or routed() inside",
            )

    def note_swap(self, adapter: str) -> None:
        """Note that an adapter gets other values."""
        self._note_change()
        self.values = {**self.values, adapter: self.values.get(adapter, 0) + 1}

    # ------------------------------------------------------------------------------- contexts

    def entered(self, context: Context, state: State) -> None:
        """Note that a context of this selection begins."""
        if are_running():
            self.current()  # a checkpoint that is running began outside of the context
        self._note_change()
        self.contexts.add(context)
        self.may_wait = any(c.may_wait for c in tuple(self.contexts))
        if not context.may_wait:
            context.shadowed[self] = getattr(self._of_thread, "state", None)
            self._of_thread.state = state

    def was_left(self, context: Context) -> None:
        """Note that a context of this selection ends."""
        self._note_change()
        if self in context.shadowed and context.of_this_thread():
            self._of_thread.state = context.shadowed.pop(self)
        self.contexts.discard(context)
        self.may_wait = any(c.may_wait for c in tuple(self.contexts))

    # -------------------------------------------------------------------------- recomputation

    def check_recomputable(self, state: State, values: Mapping[str, int]) -> None:
        """Check that the adapters of a checkpointed forward are still there, with their values."""
        for what, verb in self._changes_since(state, values):
            raise StateError(
                "backward through a checkpoint",
                f"{what} since its forward, which is to be recomputed",
                f"Run the backward before {verb}",
            )

    def _changes_since(self, state: State, values: Mapping[str, int]) -> Iterator[tuple[str, str]]:
        if state.merged != self.state.merged:
            yield "the model was merged or unmerged", "merge() or unmerge()"
        for name, number in zip(state.parts, state.numbers, strict=True):
            if self._numbers.get(name) != number:
                yield f"adapter {name!r} was ejected", "eject()"
            if self.values.get(name) != values.get(name):
                yield f"adapter {name!r} got other values", "swap_adapter()"

    def _check_known(self) -> None:
        """Check a forward in a backward that no checkpoint of torch's recomputes."""
        node = torch._C._current_autograd_node()
        if any(context.recomputes and self in context.states for context in entered()):
            return
        if node is not None and node._sequence_nr() < self._changed:
            raise StateError(
                "a forward inside a backward pass",
                "the selection or an adapter's values changed since the forward that it may "
                "recompute",
                "Use torch.utils.checkpoint, or change neither from forward to backward",
            )

    def _note_change(self) -> None:
        number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        self._changed = max(self._changed, number)

    # ---------------------------------------------------------------------------- state dicts

    def loading(self, missing_keys: list[str]) -> Loading:
        """Return what is known of the call of `load_state_dict` that collects `missing_keys`."""
        if self._loading is None or self._loading.missing_keys is not missing_keys:
            self._loading = Loading(missing_keys)
        return self._loading

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy carries: the setting and the numbers, but no open context."""
        bare = replace(self.state, numbers=(), choices={})
        numbers = (self._numbers, self._n_numbered)
        return {"state": bare, "devices": self.devices, "numbers": numbers}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        Selection.__init__(self, saved["state"])
        numbers, self._n_numbered = saved["numbers"]
        self._numbers = dict(numbers)
        self.devices = saved["devices"]
        self.state = self.prepared(self.state)


def _as_tensor(pairs: list[tuple[int, float]], device: torch.device) -> Tensor:
    """Return `(n, 2)`; a fake tensor, of the mode that the caller is in, would outlive the mode."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    with _disable_current_modes():
        return sent(pairs, device, dtype).view(-1, 2)
