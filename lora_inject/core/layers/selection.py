"""Which adapters take part, and how: the seam between a layer and what is selected.

A layer asks its `Selection`, one small object that all layers of an injected root share, which
`Selected` is in force, and that computes the layer's output and what reads of its weights give. So
switching touches no layer. The setting of the model stands in its `Selection`, for all threads; a
context of the running thread or task stands over it (`Context`).

The core has one way of taking part, a mix of adapters. Another way (an adapter for each row, the
runs of a pass) is a class like `Mix` in a room of its own, and touches no layer.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple, TypeVar
from weakref import WeakSet

import torch
from torch import nn
from torch.compiler import is_compiling

from lora_inject.core.functional.patches import hold
from lora_inject.core.functional.torch_inside import (
    constant_in_graphs,
    differentiates_forward,
    in_backward,
    in_inference,
)
from lora_inject.errors import StateError

T = TypeVar("T")

ENTERED: ContextVar[tuple[Context, ...]] = ContextVar("lora_inject_contexts", default=())
"""The contexts that the caller runs in, the innermost last (`Context`)."""


class Selected:
    """One way of taking part; what it computes from never changes, as threads and layers keep it.

    Attributes:
        names: The adapters that take part, with their weights.
        in_graph: The same in the form that compiled graphs read; None before the first.
    """

    names: Mapping[str, float]
    in_graph: Any = None

    def forward(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute an adapted layer for one call with these arguments."""
        raise NotImplementedError

    def read(
        self, layer: Any, param: str, raw: Any, entries: Mapping[str, Any], *, outside: bool
    ) -> Any:
        """Return what whoever reads a parameter gets.

        Args:
            layer: The adapted module.
            param: The name of its parameter.
            raw: The parameter.
            entries: The layer's entries on it, by adapter.
            outside: Whether another module reads it while the layer itself does not run.
        """
        raise NotImplementedError

    def among(self, entries: Mapping[str, T]) -> list[tuple[T, float]]:
        """Return those of some adapters' entries that take part, with their weights."""
        return [(entries[name], w) for name, w in self.names.items() if name in entries]

    def drops(self, layer: nn.Module) -> bool:
        """Return whether dropout of adapters acts in a layer."""
        return layer.training

    def forget_use(self) -> None:
        """Let the next forward of each layer note again which entries it uses."""


class Mix(Selected):
    """Adapters with weights, the same for the whole batch: `W + sum of w * scale * B @ A`.

    An empty mix is the plain base.
    """

    def __init__(self, names: Mapping[str, float] | None = None) -> None:
        self.names = dict(names or {})

    def forward(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a layer with the sum of the updates of the mix."""
        return layer._lora_mixed(self, args, kwargs)

    def read(
        self, layer: Any, param: str, raw: Any, entries: Mapping[str, Any], *, outside: bool
    ) -> Any:
        """Return W with the updates and trained copies of the mix."""
        taking = self.among(entries)
        return layer._lora_read_mixed(param, raw, taking, outside=outside) if taking else raw

    def __reduce__(self) -> tuple[Any, ...]:
        return Mix, (self.names,)  # without what graphs read


class Taken(NamedTuple):
    """Who took part in a forward, with what values, for when a backward runs it again.

    Attributes:
        selected: Who took part.
        versions: The versions of all adapters then.
        merged: What the weights held.
    """

    selected: Selected
    versions: Mapping[str, int]
    merged: Mapping[str, float]

    def gone(self, now: Selection) -> tuple[str, str] | None:
        """Return what has changed since, and by which verb; None if nothing has."""
        if self.merged != now.merged:
            return "the model was merged or unmerged", "merge() or unmerge()"
        for name in self.selected.names:
            if name not in now.versions:
                return f"adapter {name!r} was ejected", "eject()"
            if now.versions[name] != self.versions.get(name):
                return f"adapter {name!r} got other values", "swap_adapter()"
        return None

    def is_still(self, selected: Selected) -> bool:
        """Return whether others that take part now are the same."""
        alike = type(selected) is type(self.selected) is Mix
        return selected is self.selected or (alike and selected.names == self.selected.names)


SELECTIONS: WeakSet[Selection] = WeakSet()
"""Every selection of the process."""

_versions = itertools.count(1)
_made = itertools.count(1)


def alive(members: WeakSet[T]) -> list[T]:
    """Return the members of a weak set, to which other threads may add meanwhile."""
    references = members.data.copy()  # type: ignore[attr-defined]  # in one step
    return [member for reference in references if (member := reference()) is not None]


class Selection:
    """What all layers of a root share.

    Attributes:
        setting: Who takes part where no context says otherwise.
        merged: What is folded into the weights, where no other adapter may then be added.
        versions: For each adapter a number that changes with its values and is used once.
        devices: Where adapters are, or were.
        contexts: The contexts of this selection that are open anywhere.
        waits: Whether a coroutine holds one of them.
        in_thread: The same for compiled forwards, as dynamo reads no context variable.
        into_graphs: Gives a `Selected` the form that compiled graphs read; None before the first.
        recomputed: What is known of functions that a backward may run again.
        loading: What is known of the last `load_state_dict`; see `layers.state_dict`.
        n_made: How many there have been: a copied layer has one of its own.
    """

    n_made: ClassVar[int] = 0

    def __init__(self, setting: Selected | None = None) -> None:
        self.setting = setting or Mix()
        self.merged: Mapping[str, float] = {}
        self.versions: Mapping[str, int] = {}
        self.devices: frozenset[torch.device] = frozenset()
        self.contexts: set[Context] = set()
        self.waits = False
        self.into_graphs: Callable[[Selected, Iterable[torch.device]], None] | None = None
        self.in_thread = threading.local()  # no subclass with a default: dynamo would keep that
        self.recomputed = Recomputations()
        self.loading: Any = None
        SELECTIONS.add(self)
        hold(self)
        Selection.n_made = next(_made)

    # ---------------------------------------------------------------------------- who takes part

    def current(self) -> Selected:
        """Return who takes part in the running forward."""
        if is_compiling():  # dynamo may compile this function alone
            return self._in_graph()
        selected, known, by = self.setting, False, None
        for context in reversed(ENTERED.get()):
            known = known or context.recomputes
            if self in context.selected:
                selected, by = context.in_force(self), context
                break
        plainly = differentiates_forward() or in_inference()  # no Function's forward runs
        if not (known or (plainly and not self.recomputed.possible)):
            self.recomputed.check(self, selected, by)
        return selected

    def may_run_again(self) -> bool:
        """Return whether a Function's forward runs, which no checkpoint of torch runs again."""
        if is_compiling() or differentiates_forward() or in_inference():
            return False
        return not any(context.recomputes for context in ENTERED.get())

    def here(self) -> Selected:
        """Return who takes part where the caller is, for a checkpoint that begins there."""
        for context in reversed(ENTERED.get()):
            if self in context.selected:
                return context.selected[self]
        return self.setting

    def _in_graph(self) -> Selected:
        if self.waits:
            # dynamo cannot raise our exception: it shows the text, or continues without a graph.
            raise RuntimeError(
                "A coroutine holds routed() or disabled(), and compiled code cannot tell whose "
                "forward it is. Enter the context in a plain function instead."
            )
        follow_into_graphs()
        recomputation_is_known()
        here: Selected | None = getattr(self.in_thread, "selected", None)
        in_graph: Selected = (self.setting if here is None else here).in_graph
        return in_graph

    def taken(self) -> Taken:
        """Return who takes part where the caller is, for what may run again."""
        return Taken(self.here(), self.versions, self.merged)

    def replace(self, setting: Selected, *, merged: Mapping[str, float] | None = None) -> None:
        """Change the setting of the model, and what its weights hold."""
        self.check_settled("a change of adapters")
        self.follow(setting)
        self.merged = {} if merged is None else merged
        self.setting = setting

    def check_settled(self, asked: str, *, others: bool = False) -> None:
        """Check that a lasting change can be made now; `others` also in other threads and tasks."""
        if in_backward():
            problem = "it was called in a backward pass, which may run a forward again"
            remedy = "Call it outside, or use disabled() or routed() inside"
            raise StateError(asked, problem, remedy)
        inside = self._is_inside()
        if inside or (others and self.contexts):
            whose = "inside" if inside else "while another thread or task is inside"
            problem = f"it was called {whose} disabled() or routed(), whose end would undo it"
            raise StateError(asked, problem, "Leave the context first")

    def _is_inside(self) -> bool:
        """Return whether the caller is inside a context of this selection."""
        return any(self in context.selected for context in ENTERED.get() if not context.left)

    # ---------------------------------------------------------------------------------- adapters

    def note(self, adapter: str) -> None:
        """Note that an adapter is new, or has other values."""
        self.versions = {**self.versions, adapter: next(_versions)}

    def add(self, adapters: Iterable[str]) -> None:
        """Note adapters that are on a layer; those that are known keep their version."""
        new = {name: next(_versions) for name in adapters if name not in self.versions}
        if new:
            self.versions = {**self.versions, **new}

    def extend_to(self, device: torch.device) -> None:
        """Note that an adapter is on a device."""
        if device not in self.devices:
            self.devices |= {device}
            self.follow(self.setting)

    def forget(self, adapters: Iterable[str]) -> None:
        """Note that adapters are gone."""
        gone = set(adapters)
        self.versions = {name: n for name, n in self.versions.items() if name not in gone}

    def follow(self, selected: Selected) -> None:
        """Prepare who will take part for compiled graphs, if there are any."""
        if self.into_graphs is not None:
            self.into_graphs(selected, self.devices)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy carries: the setting.

        Raises:
            StateError: The caller is inside a context, of which a copy would know nothing.
        """
        if self._is_inside():
            raise StateError(
                "a copy or pickle of a model with adapters",
                "it was asked for inside disabled() or routed(), which hold for the model alone: "
                "in the copy the adapters of the model's setting would be on",
                "Copy it outside. A reference without adapters is the model itself inside "
                "disabled(model), or eject(copy)",
            )
        carried = ("setting", "merged", "versions", "devices")
        return {name: getattr(self, name) for name in carried}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        Selection.__init__(self)
        self.__dict__.update(saved)


@constant_in_graphs
def follow_into_graphs() -> bool:
    """Let every selection be followed into graphs; it runs while a graph is traced, not in it."""
    # Above this folder, and its decorator imports dynamo, which is at work here.
    from lora_inject.compiled.graphs import follow_all  # noqa: PLC0415

    follow_all()
    return True


@constant_in_graphs
def recomputation_is_known() -> bool:
    """Raise where a backward traces a graph that it may run under another selection."""
    known = any(context.recomputes for context in ENTERED.get())
    for selection in [] if known else alive(SELECTIONS):
        selection.recomputed.check(selection, selection.here(), traced=True)
    return True


# --------------------------------------------------------------------- functions that run again


class Recomputations:
    """What is known of functions that a backward may run again, beside torch's own checkpoints.

    Torch's checkpoints note who takes part when they begin (`checkpointing`). Of any other all that
    can be seen is this:

    1. A forward inside the forward of an autograd Function will run again in its backward. Who
       takes part in it is noted, and has to be who takes part then.
    2. Of a checkpoint by hooks nothing is seen. So a forward with gradients inside a backward is
       refused where nothing was noted and a context of the selection was entered with gradients.

    What ran in a context that was entered without gradients does not run again: a reference model's
    forward. A hook that runs a module in a backward does it without gradients, unless it asks for
    them.

    Attributes:
        possible: Whether a forward in a backward may be of others than took part before.
        noted: Who took part in forwards inside Functions, since a backward ran one of them again.
        in_context: Whether a context was entered with gradients.
        ended: Whether a backward has run one of them again, so that the next begins anew.
    """

    def __init__(self) -> None:
        self.noted: list[Taken] = []
        self.possible = self.in_context = self.ended = False

    def entered(self) -> None:
        """Note that a context is entered with gradients."""
        self.possible = self.in_context = True

    def check(
        self,
        selection: Selection,
        selected: Selected,
        by: Context | None = None,
        *,
        traced: bool = False,
    ) -> None:
        """Note a forward that may run again, and raise for one that does.

        Args:
            selection: The selection.
            selected: Who takes part.
            by: The context that says so.
            traced: Whether a graph is traced, which will not ask again.

        Raises:
            StateError: Others took part in the forward that a backward runs again.
        """
        if in_backward():
            if torch.is_grad_enabled():
                self._check_again(selection, selected, by)
        elif traced or (by is not None and not by.with_gradients):
            return
        elif not (differentiates_forward() or in_inference()):
            if self.ended:
                self.noted, self.ended = [], False
            taken = Taken(selected, selection.versions, selection.merged)
            if taken not in self.noted:
                self.noted.append(taken)
            self.possible = True

    def _check_again(self, selection: Selection, selected: Selected, by: Context | None) -> None:
        self.ended = True
        asked = "a forward inside a backward"
        for taken in self.noted:
            if (gone := taken.gone(selection)) is not None:
                problem = f"{gone[0]} since its first run"
                raise StateError(asked, problem, f"Run the backward before {gone[1]}")
        if self.in_context and not self.noted and by is None:
            problem = "no checkpoint of torch's runs it, and a context was entered with gradients"
        elif all(taken.is_still(selected) for taken in self.noted):
            return
        else:
            problem = "no checkpoint of torch's runs it, and others took part in its first run"
        raise StateError(
            asked,
            f"{problem}: which adapters it is to train cannot be told",
            "Use torch.utils.checkpoint, or run the backward before routed(), disabled() or "
            "activate() change who takes part; enter a context for what is not trained within "
            "torch.no_grad()",
        )


# ------------------------------------------------------------------------- whose context it is

# A context variable keeps threads and tasks apart; a thread or task sees the contexts that it
# inherits. As with `torch.no_grad`, a plain generator shares this variable with its consumer.
#
# | a context is | `ENTERED` of its thread or task | what a forward there does |
# |---|---|---|
# | made | does not hold it | does not see it |
# | open | holds it | runs under it, if it is the innermost of its selection |
# | left | no longer holds it; a task that inherited it still does | raises in such a task |


class Context:
    """One entered `routed` or `disabled`, or one run of a checkpointed function.

    Args:
        selected: Who takes part inside, of each selection.
        waits: Whether a coroutine holds it, which others may interrupt.
        recomputes: Whether it is a run of a checkpointed function.
    """

    def __init__(
        self,
        selected: Mapping[Selection, Selected],
        *,
        waits: bool = False,
        recomputes: bool = False,
    ) -> None:
        self.selected = selected
        self.waits = waits
        self.recomputes = recomputes
        self.left = False
        self.with_gradients = torch.is_grad_enabled()

    def enter(self) -> None:
        """Make the context the caller's innermost."""
        for selection, selected in self.selected.items():
            selection.follow(selected)
            selection.contexts.add(self)
            if self.with_gradients and not self.recomputes:
                selection.recomputed.entered()
        ENTERED.set((*ENTERED.get(), self))
        self._tell()

    def leave(self) -> None:
        """Take the context away again, as far as `enter` came; it may be called twice."""
        self.left = True
        ENTERED.set(tuple(context for context in ENTERED.get() if context is not self))
        for selection in self.selected:
            selection.contexts.discard(self)
        self._tell()

    def _tell(self) -> None:
        """Tell selections what dynamo cannot look up: whose a compiled forward of the thread is."""
        for selection in self.selected:
            selection.waits = any(each.waits for each in tuple(selection.contexts))
            here = [
                context.selected[selection]
                for context in ENTERED.get()
                if selection in context.selected and not (context.waits or context.left)
            ]
            selection.in_thread.selected = here[-1] if here else None

    def check_innermost(self) -> None:
        """Raise if the context cannot be left where the caller is; it is left all the same."""
        here = ENTERED.get()
        if self not in here:
            raise StateError(
                "leaving routed() or disabled()",
                "another thread or task entered it",
                "Leave a context where it was entered",
            )
        if any(not context.left for context in here[here.index(self) + 1 :]):
            raise StateError(
                "leaving routed() or disabled()",
                "a context that was entered later is still open",
                "Leave contexts in the reverse order of entering them",
            )

    def in_force(self, selection: Selection) -> Selected:
        """Return who takes part of a selection, in a forward that runs in this context.

        Raises:
            StateError: The caller inherited it, and who entered it has left it since.
        """
        if self.left:
            raise StateError(
                "a forward in a context that was inherited",
                "the thread or task that entered routed() or disabled() has left it",
                "Wait for what was started inside before leaving, or enter a context of its own",
            )
        return self.selected[selection]


@contextlib.contextmanager
def in_context(
    selected: Mapping[Selection, Selected], *, waits: bool = False, recomputes: bool = False
) -> Iterator[None]:
    """Run the body in a new context."""
    context = Context(selected, waits=waits, recomputes=recomputes)
    try:
        try:
            context.enter()
            yield
            context.check_innermost()
        finally:
            context.leave()
    finally:
        context.leave()  # where an interrupt ended the first call
