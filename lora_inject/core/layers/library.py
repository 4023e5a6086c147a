"""What another library changes about a model: all that is asked of one.

What is known of a library is a subclass of `Library` in a file named after it, with a row in
`lora_inject.libraries`. It is asked only while the process has loaded the library.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.survey import Carried, Survey
from lora_inject.core.layers.weight_kinds import (
    OF_ANY_LIBRARY,
    REGISTERED,
    UNKNOWN,
    Reason,
    Verb,
    WeightKind,
    defines_forward,
)
from lora_inject.core.spec.plan import Plan
from lora_inject.errors import LayerError


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

    def calls_class(self, module: nn.Module) -> bool:
        """Return whether the forward on an instance is the library's and calls the class's."""
        return False

    def offloads(self, module: nn.Module) -> bool:
        """Return whether a forward gets copies of the Parameters, whose gradients are lost."""
        return False

    def away(self, modules: Iterable[nn.Module]) -> tuple[str, str] | None:
        """Return why weights of a model on the meta device have no values, and what to do."""
        return None

    # Reads ---------------------------------------------------------------------------------------

    def moves(self, module: nn.Module, param: str, held: Tensor) -> bool:
        """Return whether the library reads a parameter to move or to round it, as it is."""
        return False

    # Around verbs --------------------------------------------------------------------------------

    def against(self, survey: Survey, plan: Plan, *, leave_new: bool) -> Iterator[tuple[str, str]]:
        """Yield the problem and the remedy of each thing in a plan that it stands against."""
        yield from ()

    def before_attach(self, survey: Survey, asked: str, *, trains: bool) -> None:
        """Called before a model gets a new adapter, and to say what would refuse one."""

    def before_load(self, survey: Survey, name: str, wanted: Sequence[Carried]) -> None:
        """Called before a model gets a new adapter, once its places are known."""

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

    def writes_here(self, survey: Survey) -> bool:
        """Return whether this process writes a model's files: one of several with shards."""
        return True

    def new_weights(self, survey: Survey) -> Sequence[str]:
        """Return the parameters that no checkpoint of a model had."""
        return ()

    def in_names_of(
        self, model: nn.Module, state: AdapterState, weights: Mapping[str, Tensor]
    ) -> AdapterState:
        """Return an adapter under the names of a model, where the library knows its older names."""
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


def check_not_offloaded(module: nn.Module) -> None:
    """Raise if a library offloads a module: gradients of copies are lost."""
    if torch.compiler.is_compiling():  # this function alone, below a layer that is not compiled
        return
    for library in knowing("offloads"):  # asked in each forward of training
        if library.is_there() and library.offloads(module):
            raise LayerError(
                f"training an adapter on a {type(module).__name__} that is offloaded",
                "its forward gets copies of all parameters, whose gradients are lost",
                "Train without offload; for inference call model.eval()",
            )


@cache
def knowing(method: str) -> tuple[Library, ...]:
    """Return the libraries, loaded or not, that override a method, for what asks very often."""
    default = getattr(Library, method)
    return tuple(each for each in libraries() if getattr(type(each), method) is not default)


def loaded_kinds() -> list[WeightKind]:
    """Return the kinds of all libraries that are loaded, those from outside first."""
    return [*REGISTERED, *(kind for library in loaded_libraries() for kind in library.packed)]


def reason_against(
    verb: Verb, module: nn.Module, weight: Tensor | None, kinds: Iterable[WeightKind]
) -> Reason | None:
    """Return why a verb cannot use a weight, packed or plain, or a layer: the first reason.

    The kinds are those of `loaded_kinds`, which is asked once for many layers. Where one from
    outside knows the weight, others are not asked.
    """
    known = [kind for kind in kinds if kind.matches(module, weight)]
    outside = [kind for kind in known if kind in REGISTERED] if REGISTERED else ()
    reasons = (kind.why_not(verb, module, weight) for kind in outside or known)
    return next((reason for reason in reasons if reason is not None), None)


def packed_weight(cls: type[nn.Module]) -> str | None:
    """Return the name of the packed weight of a class that is used as an nn.Linear but is none."""
    if issubclass(cls, nn.Linear):
        return None
    names = (kind.weight_of(cls) for kind in loaded_kinds())
    return next((name for name in names if name is not None), None)


def multiplies(cls: type[nn.Module]) -> bool:
    """Return whether the forward of a class is known to multiply by its weight, as nn.Linear's."""
    forward = defines_forward(cls)
    return any(forward in kind.forwards or kind.weight_of(cls) for kind in loaded_kinds())


def begin_training(modules: Iterable[nn.Module]) -> None:
    """Keep packed layers from what would break the gradients of adapters."""
    kinds = loaded_kinds()
    for module in modules:
        for kind in kinds:
            kind.begin_training(module)


def end_training(modules: Iterable[nn.Module]) -> None:
    """Let packed layers do again what they did before the first adapter."""
    kinds = loaded_kinds()
    for module in modules:
        for kind in kinds:
            kind.end_training(module)


def described(weight: Tensor) -> Iterable[str] | None:
    """Return the settings and a few codes of a packed tensor; None if no kind describes it."""
    said = (kind.described(weight) for kind in loaded_kinds())
    return next((each for each in said if each is not None), None)


def weight_kind(module: nn.Module, weight: Tensor) -> WeightKind:
    """Return how a layer holds a packed weight; `UNKNOWN` if nobody knows."""
    kinds = (*loaded_kinds(), *OF_ANY_LIBRARY)
    return next((kind for kind in kinds if kind.matches(module, weight)), UNKNOWN)


@torch.no_grad()
def dense(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the values that a packed weight stands for in its layer, as new float32."""
    values = weight_kind(module, weight).dense(module, weight)
    return values.to(torch.float32).contiguous()


def claims(modules: Iterable[nn.Module]) -> list[tuple[object, dict[str, object]]]:
    """Return who says that it is quantized, with the attributes that say it."""
    return [
        (owner, {name: owner.__dict__[name] for name in names if name in owner.__dict__})
        for module in modules
        for kind in loaded_kinds()
        for owner, names in kind.claims(module)
    ]
