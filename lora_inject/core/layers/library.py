"""What another library changes about a model: all that is asked of one.

What is known of a library is a subclass of `Library` in a file named after it, with a row in
`lora_inject.libraries`. It is asked only while the process has loaded the library.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, ClassVar

from torch import Tensor, nn

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.survey import Carried, Survey
from lora_inject.core.layers.weight_kinds import WeightKind
from lora_inject.core.spec.plan import Plan


class Library:
    """What must hold because a library is there; each method has a default, which is nothing.

    `before_VERB` raises where the verb would go wrong, before anything of ours is changed; it may
    bring weights together that the verb has to see whole. `after_VERB` does what the library needs
    after it, inside of what is undone if it fails.
    """

    modules: ClassVar[tuple[str, ...]] = ()
    """Its modules; it is there if any of them is loaded."""
    packed: tuple[WeightKind, ...] = ()
    """The ways in which it holds weights packed; the first that knows a weight counts."""

    def is_there(self) -> bool:
        """Return whether this process has loaded the library."""
        return any(module in sys.modules for module in self.modules)

    # Forwards that it puts onto instances --------------------------------------------------------

    def kept(self, module: nn.Module) -> Any:
        """Return the forward of before, which the library's forward on an instance calls."""
        del module

    def keep(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Let the library's forward on an instance call another one."""

    def calls_class(self, module: nn.Module) -> bool:
        """Return whether the forward on an instance is the library's and calls the class's."""
        del module
        return False

    def offloads(self, module: nn.Module) -> bool:
        """Return whether a forward gets copies of the Parameters, whose gradients are lost."""
        del module
        return False

    def away(self, modules: Iterable[nn.Module]) -> tuple[str, str] | None:
        """Return why weights of a model on the meta device have no values, and what to do."""
        del modules
        return None

    # Reads ---------------------------------------------------------------------------------------

    def moves(self, module: nn.Module, param: str, held: Tensor) -> bool:
        """Return whether the library reads a parameter to move or to round it, as it is."""
        del module, param, held
        return False

    # Around verbs --------------------------------------------------------------------------------

    def against(self, survey: Survey, plan: Plan, *, leave_new: bool) -> Iterator[tuple[str, str]]:
        """Yield the problem and the remedy of each thing in a plan that it stands against."""
        del survey, plan, leave_new
        yield from ()

    def before_attach(self, survey: Survey, asked: str) -> None:
        """Called before a model gets a new adapter, injected or loaded."""

    def before_load(self, survey: Survey, name: str, wanted: Sequence[Carried]) -> None:
        """Called before a model gets a new adapter, once its places are known."""

    def before_spread(self, asked: str, carried: Iterable[Carried]) -> None:
        """Called before an adapter is distributed as its layers are."""

    def before_read(self, survey: Survey) -> None:
        """Called before tensors of an adapter or its base are read: save, merge, optimizers."""

    def before_train(self, survey: Survey, parameters: Iterable[nn.Parameter], asked: str) -> None:
        """Called before parameters start to require gradients."""

    def before_eject(self, survey: Survey, gone: Set[str]) -> None:
        """Called before an eject."""

    def after_load(self, survey: Survey, name: str) -> None:
        """Called when an adapter is on a model and has its values."""

    def after_save(self, survey: Survey) -> None:
        """Called when files are written."""

    def after_eject(self, modules: Iterable[nn.Module]) -> None:
        """Called when adapters are off."""

    # Questions of one verb each ------------------------------------------------------------------

    def gathering(self) -> tuple[str, ...]:
        """Return the contexts in which a process holds whole tensors."""
        return ()

    def writes_here(self, survey: Survey) -> bool:
        """Return whether this process writes a model's files: one of several with shards."""
        del survey
        return True

    def sums_gradients(self, module: nn.Module) -> bool:
        """Return whether gradients of an adapter are summed in the forward of its module."""
        del module
        return False

    def new_weights(self, survey: Survey) -> Sequence[str]:
        """Return the parameters that no checkpoint of a model had."""
        del survey
        return ()

    def in_names_of(
        self, model: nn.Module, state: AdapterState, weights: Mapping[str, Tensor]
    ) -> AdapterState:
        """Return an adapter under the names of a model, where the library knows its older names."""
        del model, weights
        return state


class Packs(Library):
    """A library of which no more is known than how it packs weights."""

    def __init__(self, module: str, *packed: WeightKind) -> None:
        self.modules = (module,)  # type: ignore[misc] # of the class where a class knows more
        self.packed = packed


LIBRARIES: list[Library] = []
"""In the order in which they are asked; `lora_inject.libraries` fills it."""


def libraries() -> list[Library]:
    """Return all that is known of other libraries."""
    if not LIBRARIES:
        # Above this folder, as some of them know verbs.
        from lora_inject.libraries import fill  # noqa: PLC0415

        fill()
    return LIBRARIES


def loaded_libraries() -> list[Library]:
    """Return the libraries that this process has loaded."""
    return [library for library in libraries() if library.is_there()]


def this_process_writes(survey: Survey) -> bool:
    """Return whether this process writes a model's files: one of several with shards."""
    return all(library.writes_here(survey) for library in loaded_libraries())


def note_saved(survey: Survey) -> None:
    """Let each library do what it needs when files are written."""
    for library in loaded_libraries():
        library.after_save(survey)
