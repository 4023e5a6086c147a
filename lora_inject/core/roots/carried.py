"""The roots, adapted modules and adapters of a model, read from its modules on each call.

The model is the only state. A root is a module that was injected; a small record on it holds what
`eject` must restore and which modules each adapter was put on. No root lies inside another. A
module that was not injected may hold several roots, and two roots may share layers: such have one
selection. All names are those of the model that a verb is called on.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from lora_inject.core.layers.attached import Attached, Entry, attached_to, check_class_kept
from lora_inject.core.layers.selection import Selection, alive
from lora_inject.core.layers.survey import Carried, Holder, Survey, unwrapped
from lora_inject.core.spec.names import joined, nearest
from lora_inject.errors import StateError, check_type

ROOT = "_lora_root"

F = TypeVar("F", bound=Callable[..., Any])

ROOT_MODULES: WeakSet[nn.Module] = WeakSet()
"""Modules that hold a record: two of them may share layers without one being inside the other."""


_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def lock_of(model: nn.Module) -> Any:
    """Return what one thread at a time holds while it changes an injected model.

    So what a verb has found holds until it acts. A part that was injected by itself has its own.
    """
    model = unwrapped(model)
    roots = [] if ROOT in model.__dict__ else [m for m in model.modules() if ROOT in m.__dict__]
    return _LOCKS.setdefault(roots[0] if len(roots) == 1 else model, threading.RLock())


def alone(verb: F) -> F:
    """Let a verb hold the lock of its model."""

    @functools.wraps(verb)
    def locked(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with lock_of(model):
            return verb(model, *args, **kwargs)

    return cast("F", locked)


@dataclass
class Root:
    """What the root of an injected model remembers."""

    selection: Selection  # the cell that all its layers share
    # By adapter: the config it was injected with, as plain data, and the modules it was put on.
    configs: dict[str, Mapping[str, Any] | None] = field(default_factory=dict)
    carrying: dict[str, list[nn.Module]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # it was read from or written to last
    slots: set[str] = field(default_factory=set)  # take other ranks and sites: `core.model.slots`
    trainable: set[str] = field(default_factory=set)  # adapters that may require gradients
    # Base parameters that required a gradient before the first inject, by their name at that time.
    required_grad: dict[str, Holder] = field(default_factory=dict)
    before_merge: Any = None  # what `unmerge` restores while the model is merged; see `model.merge`
    kept: tuple[Any, Reach] | None = None  # a walk of the model and its generation; see `reach`

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, without values that were read from another model."""
        return {**self.__dict__, "kept": None}


def root_at(survey: Survey) -> Root | None:
    """Return the record of a model that is a root itself."""
    record: Root | None = survey.model.__dict__.get(ROOT)
    return record


def known_roots() -> list[tuple[nn.Module, Root]]:
    """Return the roots of the process that a verb has seen."""
    return [(m, m.__dict__[ROOT]) for m in alive(ROOT_MODULES) if ROOT in m.__dict__]


def roots_of(survey: Survey) -> dict[str, Root]:
    """Return the records of all injected roots in a model, by name; `""` is the model itself."""
    roots = {path: module for path, module in survey.modules if ROOT in module.__dict__}
    ROOT_MODULES.update(roots.values())  # a copy or a pickle has not registered its roots
    return {path: module.__dict__[ROOT] for path, module in roots.items()}


def root_of(survey: Survey) -> Root:
    """Return the record of the model, or that of the only root inside."""
    inner = roots_of(survey)
    root = inner.get("") or (next(iter(inner.values())) if len(inner) == 1 else None)
    if root is None:
        problem = "this module has no adapters"
        if inner:
            problem = f"parts of this module were injected, each alone: {sorted(inner)}"
        remedy = "Call it on the model that was given to inject"
        raise StateError("merge or unmerge", problem, remedy)
    return root


def names_at(survey: Survey) -> set[str]:
    """Return the adapters that the roots inside a model have."""
    return {name for record in roots_of(survey).values() for name in record.configs}


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
    """Return an entry whose site has the name that it has in this model."""
    spec, weight = entry.spec, joined(path, entry.param)
    if spec is None or spec.weight == weight:
        return entry
    owner = spec.weight.rpartition(".")[0]
    inside = bool(owner) and path.endswith(f".{owner}")
    aliases = tuple(path.removesuffix(owner) + alias for alias in spec.aliases if inside)
    name = weight if spec.name == spec.weight else path
    return replace(entry, spec=spec.at(name, weight, aliases))


def records_of(survey: Survey, name: str) -> list[tuple[nn.Module, Root]]:
    """Return the roots that an adapter was put on: those inside the model, else those around it."""
    inside = [(survey.by_name[path], record) for path, record in roots_of(survey).items()]
    holding = [(module, record) for module, record in inside if name in record.carrying]
    if holding:
        return holding
    selections = set(map(id, reach(survey.model, survey).selections))
    around = ((m, r) for m, r in known_roots() if id(r.selection) in selections)
    return [(module, record) for module, record in around if name in record.carrying]


def note_files(survey: Survey, name: str, path: Path | None) -> None:
    """Note the files of an adapter, for whoever asks what it should compute; None: it has none."""
    for _, record in records_of(survey, name):
        if path is None:
            record.files.pop(name, None)
        else:
            record.files[name] = str(path.absolute())


@dataclass(frozen=True, eq=False)
class Reach:
    """What a verb on a model reaches: the distinct selections inside, and the adapters.

    `gained` are the adapters with a gain at any site.
    """

    selections: tuple[Selection, ...]
    names: frozenset[str]
    gained: frozenset[str]


_generations = itertools.count(1)
_generation = 0


def structure_changed() -> None:
    """Mark every kept walk as out of date, after adapters were added or removed on any model."""
    global _generation  # noqa: PLW0603 - counts inject and eject, so that roots can keep a walk
    _generation = next(_generations)


def reach(model: nn.Module, survey: Survey | None = None) -> Reach:
    """Return the selections and adapters in a model.

    The result is kept on the root, and on the walk of a verb, until the next inject or eject, or
    copy of a layer. So the cost of switching does not depend on the size of the model.
    """
    model = unwrapped(model)
    now = _generation, Selection.n_made
    keepers = [keeper for keeper in (model.__dict__.get(ROOT), survey) if keeper is not None]
    for keeper in keepers:
        if keeper.kept is not None and keeper.kept[0] == now:
            kept: Reach = keeper.kept[1]
            return kept
    survey = survey or Survey(model)
    without_layers = dict(_without_layers(survey))
    selections = dict.fromkeys(without_layers.values())
    names = set(without_layers)
    gained: set[str] = set()
    for _, _, attached in adapted_modules(survey):
        selections[attached.selection] = None
        names.update(attached.forward, *attached.reads.values())
        if attached.gains or attached.reads:  # keeps later verbs fast with many adapters
            gained.update(entry.adapter for entry in attached.entries() if entry.gained)
    reached = Reach(tuple(selections), frozenset(names), frozenset(gained))
    for keeper in keepers:
        keeper.kept = (now, reached)
    return reached


def _without_layers(survey: Survey) -> Iterator[tuple[str, Selection]]:
    """Yield the adapters that have no layer in this process: of a model that lies in several."""
    for record in roots_of(survey).values():
        yield from ((name, record.selection) for name, held in record.carrying.items() if not held)


def check_names(known: frozenset[str], names: Iterable[str], verb: str) -> set[str]:
    """Return the names, or raise if one is not an adapter of the model."""
    listed = list(names)
    for name in listed:
        check_type(f"{verb} {name!r}", name, str, "Give the name of an adapter")
        if name not in known:
            raise no_such_adapter(known, name, verb)
    return set(listed)


def whole_adapter(survey: Survey, name: str, asked: str) -> list[Carried]:
    """Return the entries of an adapter; raise if the model does not hold all of them."""
    check_names(reach(survey.model, survey).names | names_at(survey), [name], asked)
    held = list(entries(survey, name))
    for path, module, _ in held:
        check_class_kept(module, f"{asked} {name!r} at {path!r}")
    if records := [*records_of(survey, name)]:  # a copy of a layer has no root
        _check_whole(survey, name, held, records, f"{asked} {name!r}")
    return held


def all_take_part(items: Collection[Carried]) -> bool:
    """Return whether a forward has used each entry, and all have a gradient or none has."""
    for item in items:
        attached = attached_to(item.module)
        if attached is not None and item.entry.mark not in attached.took_part:
            return False
    return len({*map(has_gradient, items)}) < 2


def has_gradient(item: Carried) -> bool:
    """Return whether a tensor of an entry has a gradient."""
    return any(t.grad is not None for t in item.entry.tensors(item.module).values())


def check_unmerged(asked: str, *selections: Selection) -> None:
    """Raise if the weights hold a merged adapter."""
    for selection in selections:
        if selection.merged:
            merged = ", ".join(name for name in selection.merged)
            problem = f"{merged!r} is merged into the weights"
            raise StateError(asked, problem, "Call unmerge(model) first")


def no_such_adapter(known: Collection[str], name: str, verb: str) -> StateError:
    """Return the error, with the nearest name."""
    there = ", ".join(map(repr, sorted(known))) or "none"
    close = nearest(name, known, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else "Inject or load it first"
    return StateError(f"{verb} {name!r}", f"the model's adapters are: {there}", hint)


def _check_whole(
    survey: Survey,
    name: str,
    held: Iterable[Carried],
    records: Iterable[tuple[nn.Module, Root]],
    asked: str,
) -> None:
    """Raise for the first layer of an adapter that a model lacks, or else for the first copy.

    `held` are the entries of the adapter in the model, `records` the roots that it was put on, each
    with its record.
    """
    carrying = {id(module): module for _, record in records for module in record.carrying[name]}
    there = {id(item.module): item for item in held}
    for key, module in carrying.items():
        if key not in there:
            in_model = any(id(root) in survey.paths for root, _ in records)
            raise _lost(asked, name, module, in_model=in_model)
    for key, item in there.items():
        if key not in carrying:
            problem = f"layer {item.path!r} has it, too, and inject did not put it there: it is a "
            remedy = "Copy layers before inject, or call eject(layer) of the copy"
            raise StateError(asked, f"{problem}copy", remedy)


def _lost(asked: str, name: str, module: nn.Module, *, in_model: bool) -> StateError:
    """Return the error of a layer that carries a part of an adapter and is not in the model."""
    attached = attached_to(module)
    entry = next(attached.entries(name), None) if attached is not None else None
    site = type(module).__name__
    if entry is not None:
        site = entry.param if entry.spec is None else entry.spec.name
    problem = f"the layer that carries its site {site!r} is not in the model"
    if in_model:
        return StateError(asked, f"{problem} any more", "Put the layer back, or eject the adapter")
    problem += ", which shares only some of its layers"
    return StateError(asked, problem, "Call it on the injected model")
