"""A model whose layers are in several processes, as pipelines have it: one adapter on all of them.

Every process calls the same function with its stage. What a config means is asked of the names of
the whole model, so all see the same mistakes, and a rule may match nothing in one of the processes.
What one process alone refuses is refused by all, before anything has changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import nn

from lora_inject.core.adapter.fingerprint import union_of
from lora_inject.core.adapter.other_tensors import mapped, only
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.candidates import inventory
from lora_inject.core.model.base import Base
from lora_inject.core.model.fit_state import fit, in_names_here
from lora_inject.core.model.load import read_for
from lora_inject.core.model.put import places_of_plan, put_plan, put_state, survey_for
from lora_inject.core.model.save import saved_state
from lora_inject.core.model.training import check_live_inputs
from lora_inject.core.roots.root import Injected
from lora_inject.core.spec.config import ConfigLike
from lora_inject.core.spec.inventory import Inventory
from lora_inject.core.spec.names import canonical, quoted
from lora_inject.core.spec.plan import Plan
from lora_inject.core.spec.resolve import resolve
from lora_inject.errors import FormatError, LayerError, LoraInjectError, MatchError, StateError
from lora_inject.formats.exchange import DEFAULT, write_adapter
from lora_inject.formats.from_peft import config_of

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def inject_stages(
    stage: M, config: ConfigLike, name: str = "default", *, group: Any, leave_new: bool = False
) -> M:
    """Put a new adapter onto the stages of a pipeline: `inject`, called by every process.

    Patterns must match, and `expect` must hold, over all stages; one of them may get nothing.

    Args:
        stage: The layers of this process, under the names of the whole model.
        config: As for `inject`.
        name: Name of the adapter.
        group: A group of torch.distributed with one process for each stage.
        leave_new: As for `inject`.

    Returns:
        The same object. All raise, or none: what one process refuses is refused by all.

    Raises:
        MatchError: A pattern matches nothing, or several stages have what it matches.
        LayerError: A matched module cannot carry an adapter, here or in another process.
        StateError: This process is not in the group; and what `inject` raises.
    """
    processes = _Processes(group, f"inject {name!r}")
    with processes.agreed():
        survey = survey_for(stage, name)
        check_live_inputs(survey, processes.asked)
        present = inventory(survey)
    parts = processes.all(present)
    with processes.agreed():
        whole = _union(parts)
        planned = resolve(config_of(config, whole, stage), whole)
        mine = _part(planned, parts, present, processes.asked)
        wanted = places_of_plan(survey, name, mine, present, leave_new=leave_new)
    processes.put(lambda last: put_plan(survey, name, mine, wanted, last=last))
    return stage


def load_stages(
    stage: M,
    path: str | PathLike[str],
    name: str = "default",
    *,
    group: Any,
    leave_out: Sequence[str] = (),
    base: Base = "same",
    leave_new: bool = False,
    trainable: bool = False,
    format: str | None = None,  # noqa: A002
    revision: str | None = None,
    **options: Any,
) -> M:
    """Load an adapter onto the stages of a pipeline: each takes what it has layers for.

    Args:
        stage: The layers of this process, under the names of the whole model.
        path: As for `load_adapter`, and so are the options.
        name: Its name on this model.
        group: A group of torch.distributed with one process for each stage.
        leave_out: Patterns of trained tensors and sites to let go.
        base: How sure to be of the base.
        leave_new: Whether weights may differ that no checkpoint of this model had.
        trainable: Whether to go on training it.
        format: A row of `formats.FORMATS`.
        revision: Branch, tag or commit of a repository.
        **options: For the format.

    Returns:
        The same object. All raise, or none.

    Raises:
        FormatError: No process has a layer that it is for; and what `load_adapter` raises.
        LayerError: Another process refused it.
    """
    processes = _Processes(group, f"load {str(path)!r}")
    asked = processes.asked
    with processes.agreed():
        survey = survey_for(stage, name)
        if trainable:
            check_live_inputs(survey, asked)
        _, _, state = read_for(survey, path, format, revision, options, asked)
        state = in_names_here(survey, state, leave_out, asked)
        present = inventory(survey)
        names = [*state.sites, *state.trained]
        taken = {n for n in names if n in present.sites or n in present.listed}
        fitted = fit(survey, only(state, taken), (), base, leave_new=leave_new, asked=asked)
    everywhere = set().union(*processes.all(taken))
    if missing := [n for n in names if n not in everywhere]:
        problem = f"no process of the group has {quoted(missing[:3])}"
        raise FormatError(asked, problem, "Load it onto the model that it was made for")
    processes.put(lambda last: put_state(survey, fitted, name, trainable=trainable, last=last))
    return stage


def save_stages(
    stage: nn.Module,
    path: str | PathLike[str],
    name: str = "default",
    *,
    group: Any,
    format: str | None = None,  # noqa: A002
    unused: Sequence[str] = (),
    **options: Any,
) -> None:
    """Save one adapter of all stages of a pipeline, as one process with the whole model would.

    Args:
        stage: The layers of this process, under the names of the whole model.
        path: Where the first process of the group writes.
        name: The adapter.
        group: A group of torch.distributed with one process for each stage.
        format: A row of `formats.FORMATS`.
        unused: Patterns of what may be without use; see `save_adapter`.
        **options: For the format.

    Raises:
        StateError: Several stages have the same part of it; and what `save_adapter` raises.
        LayerError: Another process refused it.
    """
    processes = _Processes(group, f"save adapter {name!r}")
    format = format or DEFAULT  # noqa: A001
    with processes.agreed():
        survey = Injected(stage, processes.asked)
        state, facts = saved_state(survey, name, format, unused)
    parts = processes.at_first(mapped(state, _on_cpu))
    with processes.agreed():
        if parts:
            whole = _joined(parts, processes.asked)
            write_adapter(whole, path, format, facts=facts, **options)


class _Processes:
    """The processes of a group, each of which has other layers of a model."""

    def __init__(self, group: Any, asked: str) -> None:
        distributed = torch.distributed
        is_group = distributed.is_available() and isinstance(group, distributed.ProcessGroup)
        if not is_group or distributed.get_rank(group) < 0:
            problem = f"group is {group!r}, of which this process is no member"
            raise StateError(asked, problem, "Give a group of torch.distributed")
        self.group, self.asked = group, asked
        self.size = distributed.get_world_size(group)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Raise where the body fails in any process."""
        try:
            yield
        except Exception as error:
            self.all(_text(error))
            raise
        self._refuse_others()

    def put(self, work: Callable[[Callable[[], None]], None]) -> None:
        """Do what changes a model, and ends in the call that it is given.

        What fails in one process is undone in all.
        """
        told: list[bool] = []

        def last() -> None:
            told.append(True)
            self._refuse_others()

        try:
            work(last)
        except Exception as error:
            if not told:
                self.all(_text(error))
            raise

    def all(self, value: T) -> list[T]:
        """Return the value of each process."""
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def at_first(self, value: T) -> list[T]:
        """Return the value of each process in the first one, nothing in the others."""
        is_first = torch.distributed.get_rank(self.group) == 0
        values: list[Any] | None = [None] * self.size if is_first else None
        first = torch.distributed.get_process_group_ranks(self.group)[0]
        torch.distributed.gather_object(value, values, dst=first, group=self.group)
        return values or []

    def _refuse_others(self) -> None:
        """Say that this process agrees, and raise where another does not."""
        for rank, text in enumerate(self.all(None)):
            if text is not None:
                problem = f"process {rank} of the group refused it: {text}"
                remedy = "Mend it there; nothing has changed in any process"
                raise LayerError(self.asked, problem, remedy)


def _text(error: Exception) -> str:
    known = isinstance(error, LoraInjectError)
    return str(error).rstrip(".") if known else f"{type(error).__name__}: {error}"


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu()


def _part(plan: Plan, parts: Sequence[Inventory], here: Inventory, asked: str) -> Plan:
    """Return what of a plan for the whole model is for this process.

    Raises:
        MatchError: Several processes have what the plan adapts or trains.
    """
    touched = [canonical(site.weight) for site in plan.sites]
    touched += [trained.name for trained in plan.trained]
    for name in touched:
        ranks = [
            n for n, part in enumerate(parts) if name in part.parameters or name in part.weights
        ]
        if len(ranks) > 1:
            problem = f"processes {', '.join(map(str, ranks))} of the group each have {name!r}"
            remedy = "Exclude it where it is one tensor with copies; give parts the names that "
            remedy += "they have in the whole model; call inject where each process has all"
            raise MatchError(asked, problem, remedy)
    known = {*here.listed, *here.weights}
    sites = tuple(site for site in plan.sites if canonical(site.weight) in known)
    trained = tuple(entry for entry in plan.trained if entry.name in known)
    return replace(plan, sites=sites, trained=trained)


def _union(several: Sequence[Inventory]) -> Inventory:
    """Return the names of several parts of a model; a name that two have is that of the first."""
    candidates = _first({c.name: c for c in each.candidates} for each in several)
    parameters = _first(each.parameters for each in several)
    others = _first(each.others for each in several)
    aliases = _first(each.aliases for each in several)
    return Inventory(
        candidates=tuple(candidates.values()),
        others={name: what for name, what in others.items() if name not in candidates},
        parameters=parameters,
        aliases={name: first for name, first in aliases.items() if name not in parameters},
        heads=_distinct(each.heads for each in several),
        buffers=_distinct(each.buffers for each in several),
        mixtures=_distinct(each.mixtures for each in several),
    )


def _first(several: Iterable[Mapping[str, T]]) -> dict[str, T]:
    """Return the values of all by name, each from the first one that has it."""
    values: dict[str, T] = {}
    for each in several:
        values.update((name, value) for name, value in each.items() if name not in values)
    return values


def _distinct(several: Iterable[tuple[T, ...]]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(value for each in several for value in each))


def _joined(parts: Sequence[AdapterState], asked: str) -> AdapterState:
    """Return one adapter of parts that have nothing in common."""
    counts = Counter(name for part in parts for name in (*part.sites, *part.trained))
    for name, count in counts.items():
        if count > 1:
            problem = f"{count} processes of the group have a part {name!r} of it"
            raise StateError(asked, problem, "Save it without group, once in each of them")
    prints = [part.fingerprint for part in parts if part.fingerprint is not None]
    configs = [part.config for part in parts if part.config is not None]
    return AdapterState(
        _first(part.sites for part in parts),
        _first(part.trained for part in parts),
        next(iter(configs), None),
        union_of(prints) if prints else None,
        rows=_first(part.rows for part in parts),
    )
