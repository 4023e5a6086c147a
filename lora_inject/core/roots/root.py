"""What an injected model remembers.

1. A *root* is the module that was given to `inject`. It has one record in its `__dict__`, which
   goes with copies and pickles of it. Verbs ask nothing else, and names are those of the root.
2. A verb works on the root, or on a module that holds just one.
3. A layer belongs to one root: a model inside or around a root, or with layers that another root
   has adapted, gets no adapter, as two records could not say what is active.
"""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from lora_inject.core.layers.attached import Attached, Entry, attached_to, check_class_kept
from lora_inject.core.layers.selection import Selection, alive
from lora_inject.core.layers.survey import Carried, Survey, unwrapped
from lora_inject.core.spec.names import joined, nearest
from lora_inject.errors import StateError, check_type

ROOT = "_lora_root"

F = TypeVar("F", bound=Callable[..., Any])

_ROOTS: WeakSet[nn.Module] = WeakSet()
"""The roots of the process that a verb has seen."""

_LOCKS: WeakKeyDictionary[nn.Module, AbstractContextManager[bool]] = WeakKeyDictionary()


@dataclass
class Adapter:
    """What a root remembers of one adapter.

    Attributes:
        name: Its name.
        config: What it was injected with, as plain data.
        modules: The modules that it was put on.
        gained: Whether it has a gain (DoRA) at any site.
        files: What it was read from or written to last.
        is_slot: Whether it takes other ranks and sites: `core.model.slots`.
    """

    name: str
    config: Mapping[str, Any] | None
    modules: Sequence[nn.Module]
    gained: bool = False
    files: Path | None = None
    is_slot: bool = False


@dataclass(eq=False)
class Root:
    """The record of an injected model.

    Attributes:
        selection: The cell that all its layers share.
        adapters: Its adapters by name, in the order of injection.
        trainable: Names of the adapters that may require gradients.
        flags: Modules and names of the base parameters, and whether they required a gradient
            before the first adapter that trained; None until then.
        before_merge: What `unmerge` restores while the model is merged; see `model.merge`.
        n_changes: How often adapters came or went.
        seen: How many selections there were when all layers were last seen to have this one.
        steps: Those that led to the layers of its adapters then: children, a name, and the child.
    """

    selection: Selection
    adapters: dict[str, Adapter] = field(default_factory=dict)
    trainable: set[str] = field(default_factory=set)
    flags: Sequence[tuple[nn.Module, str, bool]] | None = None
    before_merge: Any = None
    n_changes: int = 0
    seen: int = 0
    steps: tuple[tuple[Mapping[str, Any], str, nn.Module], ...] = ()

    def is_in_place(self) -> bool:
        """Return whether no layer with adapters was replaced, nor anything that it is in."""
        return all(children.get(name) is child for children, name, child in self.steps)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, all of whose layers are to be looked at."""
        return {**self.__dict__, "seen": 0, "steps": ()}


class Injected(Survey):
    """The walk of an injected model, with its record.

    Raises:
        StateError: The model is not injected, nor just one of its parts.
    """

    def __init__(self, model: nn.Module, asked: str) -> None:
        module, self.root = root_of(model, asked)
        super().__init__(module)
        self.given = model


def root_of(model: nn.Module, asked: str, *, whole: bool = True) -> tuple[nn.Module, Root]:
    """Return the injected model that a verb is for, and its record; see `find_root`.

    Raises:
        StateError: There is none, or more than one.
    """
    root = find_root(model, asked, whole=whole)
    if root is None:
        remedy = "Call it on the model that was given to inject, or inject first"
        raise StateError(asked, "this module has no adapter", remedy)
    return root


def find_root(model: nn.Module, asked: str, *, whole: bool = True) -> tuple[nn.Module, Root] | None:
    """Return the same, or None for a model without adapters.

    `whole` asks whether all layers of its adapters are there and have the root's selection, which
    takes no walk but after a layer was moved or copied, or another model was injected.
    """
    model = unwrapped(model)
    if ROOT not in model.__dict__:
        inside = [(path, m) for path, m in model.named_modules() if ROOT in m.__dict__]
        if not inside:
            _refuse_part(model, asked)
            return None
        if len(inside) > 1:
            names = ", ".join(repr(path) for path, _ in inside)
            problem = f"parts of this module were injected, each alone: {names}"
            raise StateError(asked, problem, "Call it on one of them, or inject the whole model")
        model = inside[0][1]
    root: Root = model.__dict__[ROOT]
    if whole and not (root.seen == Selection.n_made and root.is_in_place()):
        _ROOTS.add(model)  # a copy or a pickle has not registered itself
        modules = dict(model.named_modules())
        _refuse_foreign(modules.items(), root, asked)
        for adapter in root.adapters.values():
            _refuse_lost(adapter, {id(module) for module in modules.values()}, asked)
        root.steps = _steps_to_layers(modules, root)
        root.seen = Selection.n_made
    return model, root


def _refuse_part(model: nn.Module, asked: str) -> None:
    if any(attached_to(module) is not None for module in model.modules()):
        problem = "it is a part of a model that was injected, or a copy of such a part"
        remedy = "Call it on the model that was given to inject, or eject the copy"
        raise StateError(asked, problem, remedy)


def is_left_over(model: nn.Module) -> bool:
    """Return whether it has adapters of no root: it is a copy of a part, or the root is gone."""
    parts = [*unwrapped(model).modules()]
    if any(ROOT in part.__dict__ for part in parts):
        return False
    theirs = {held.selection for part in parts if (held := attached_to(part)) is not None}
    known = {m.__dict__[ROOT].selection for m in alive(_ROOTS) if ROOT in m.__dict__}
    return bool(theirs) and theirs.isdisjoint(known)


def _refuse_foreign(modules: Iterable[tuple[str, nn.Module]], root: Root, asked: str) -> None:
    """Refuse a model with a layer that follows another setting than its own."""
    for path, module in modules:
        attached = attached_to(module)
        if attached is not None and attached.selection is not root.selection:
            problem = f"layer {path!r} has adapters that inject did not put there: it is a copy, "
            problem += "or a layer of another injected model"
            remedy = "Copy layers before inject; eject(model) takes all adapters off again"
            raise StateError(asked, problem, remedy)


def _steps_to_layers(
    modules: Mapping[str, nn.Module], root: Root
) -> tuple[tuple[Mapping[str, Any], str, nn.Module], ...]:
    carrying = {id(module) for adapter in root.adapters.values() for module in adapter.modules}
    steps: dict[str, tuple[Mapping[str, Any], str, nn.Module]] = {}
    for path, module in modules.items():
        step = path if id(module) in carrying else ""
        while step and step not in steps:
            above, _, name = step.rpartition(".")
            steps[step] = modules[above]._modules, name, modules[step]
            step = above
    return tuple(steps.values())


def _refuse_lost(adapter: Adapter, there: Collection[int], asked: str) -> None:
    """Refuse a model that has lost a layer of an adapter, which would act without it."""
    for module in adapter.modules:
        if id(module) not in there:
            attached = attached_to(module)
            entry = next(attached.entries(adapter.name), None) if attached is not None else None
            site = type(module).__name__
            if entry is not None:
                site = entry.param if entry.spec is None else entry.spec.name
            problem = f"the layer that carries site {site!r} of adapter {adapter.name!r} is not in "
            remedy = "Put the layer back, or eject the adapter"
            raise StateError(asked, f"{problem}the model any more", remedy)


def lock_of(root: nn.Module) -> AbstractContextManager[bool]:
    """Return what one thread at a time holds while it changes an injected model.

    So what a verb has found holds until it acts.
    """
    return _LOCKS.setdefault(root, threading.RLock())


def alone(verb: F) -> F:
    """Let a verb hold the lock of its model."""

    @functools.wraps(verb)
    def locked(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inside = (m for m in unwrapped(model).modules() if ROOT in m.__dict__)
        with lock_of(next(inside, unwrapped(model))):
            return verb(model, *args, **kwargs)

    return cast("F", locked)


# Its adapters -----------------------------------------------------------------------------------


def check_names(root: Root | None, names: Iterable[str], asked: str) -> set[str]:
    """Return the names, or raise if one is not an adapter of the model."""
    known = {} if root is None else root.adapters
    listed = list(names)
    for name in listed:
        check_type(f"{asked} {name!r}", name, str, "Give the name of an adapter")
        if name not in known:
            there = ", ".join(map(repr, sorted(known))) or "none"
            close = nearest(name, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else "Inject or load it first"
            raise StateError(f"{asked} {name!r}", f"the model's adapters are: {there}", hint)
    return set(listed)


def check_unmerged(asked: str, root: Root) -> None:
    """Raise if the weights hold a merged adapter."""
    if root.selection.merged:
        problem = f"{', '.join(root.selection.merged)!r} is merged into the weights"
        raise StateError(asked, problem, "Call unmerge(model) first")


def adapted_modules(survey: Survey) -> Iterator[tuple[str, nn.Module, Attached]]:
    """Yield the modules that carry adapters, by canonical name, in the order of the model."""
    for path, module in survey.modules:
        if (attached := attached_to(module)) is not None:
            yield path, module, attached


def entries(survey: Survey, name: str | None = None) -> Iterator[Carried]:
    """Yield the entries of one adapter, or of all."""
    for path, module, attached in adapted_modules(survey):
        for entry in attached.entries(name):
            yield Carried(path, module, _named(path, entry))


def _named(path: str, entry: Entry) -> Entry:
    """Return an entry whose site has the name that its layer has now: one may have been moved."""
    spec, weight = entry.spec, joined(path, entry.param)
    if spec is None or spec.weight == weight:
        return entry
    return replace(entry, spec=spec.at(weight if spec.name == spec.weight else path, weight))


def whole_adapter(survey: Injected, name: str, asked: str) -> list[Carried]:
    """Return the entries of an adapter; raise if the model has lost a layer of it."""
    check_names(survey.root, [name], asked)
    held = list(entries(survey, name))
    for path, module, _ in held:
        check_class_kept(module, f"{asked} {name!r} at {path!r}")
    _refuse_lost(survey.root.adapters[name], {id(item.module) for item in held}, asked)
    return held


def has_gradient(item: Carried) -> bool:
    """Return whether a tensor of an entry has a gradient."""
    return any(t.grad is not None for t in item.entry.tensors(item.module).values())


# A new one --------------------------------------------------------------------------------------


def check_new_adapter(survey: Survey, name: str, wanted: Iterable[Carried] = ()) -> None:
    """Check that a model can get an adapter of that name now, at the places that are wanted.

    Raises:
        StateError: It has one of that name, lies inside or around a root, or has layers of one; it
            is merged, or in use.
    """
    asked = f"adapter {name!r}"
    if not isinstance(name, str) or not name:
        problem = "a name is a string of one character or more"
        raise StateError(asked, problem, "Give another name")
    _check_apart(survey, asked, wanted)
    root: Root | None = survey.model.__dict__.get(ROOT)
    if root is None:
        for path, module in survey.modules:
            if ROOT in module.__dict__ or attached_to(module) is not None:
                problem = f"a part of it, {path!r}, was injected by itself, or is copied from such"
                remedy = "Inject into that part again, or eject it and inject into the whole model"
                raise StateError(asked, problem, remedy)
        return
    _refuse_foreign(survey.modules, root, asked)
    if name in root.adapters:
        problem = "the model has one of that name"
        raise StateError(asked, problem, "Eject it, or choose another name")
    root.selection.check_settled(f"adding {asked}")
    check_unmerged(f"adding {asked}", root)


def _check_apart(survey: Survey, asked: str, wanted: Iterable[Carried]) -> None:
    """Raise if a model, or a layer that is to be adapted, is a part of another root."""
    modules = {id(survey.model), *(id(place.module) for place in wanted)}
    if _are_in_others(survey.model, modules):
        gc.collect()  # a model that was deleted and lies in a cycle of references waits for it
        if _are_in_others(survey.model, modules):
            problem = "the module, or a layer that it would adapt, is a part of another model that "
            remedy = (
                "Inject into that model, with patterns that begin with the name of the part; if it "
                "is gone, eject this part first"
            )
            raise StateError(asked, f"{problem}was injected", remedy)


def _are_in_others(model: nn.Module, modules: set[int]) -> bool:
    others = [root for root in alive(_ROOTS) if root is not model and ROOT in root.__dict__]
    return any(id(part) in modules for root in others for part in root.modules())


def become_root(model: nn.Module) -> Root:
    """Return the record of a model, which is a root from now on."""
    root: Root | None = model.__dict__.get(ROOT)
    if root is None:
        root = model.__dict__[ROOT] = Root(Selection())
        _ROOTS.add(model)
    return root
