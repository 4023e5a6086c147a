"""A model whose layers are in several processes, as pipelines have it: one adapter on all of them.

Every process calls the same verb. What a config means is asked of the names of the whole model, so
all see the same mistakes, and a rule may match nothing in one of the processes. What one process
alone refuses is refused by all, before anything has changed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from lora_inject.core.adapter.fingerprint import union_of
from lora_inject.core.adapter.other_tensors import mapped, only
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.survey import Carried, Survey
from lora_inject.core.model.fit_state import Part
from lora_inject.core.model.put import places_of_plan, put_plan_on, surveyed
from lora_inject.core.spec.config import ConfigLike
from lora_inject.core.spec.inventory import Inventory
from lora_inject.core.spec.names import canonical, quoted
from lora_inject.core.spec.plan import Plan
from lora_inject.core.spec.resolve import resolve
from lora_inject.errors import FormatError, LayerError, LoraInjectError, MatchError, StateError
from lora_inject.formats.from_peft import config_of

T = TypeVar("T")
F = TypeVar("F")


def inject_by_all(
    group: Any,
    model: nn.Module,
    config: ConfigLike,
    name: str,
    probe: Callable[[], Any] | None,
    *,
    leave_new: bool,
) -> None:
    """Put a new adapter onto the parts of a model; see `inject`."""
    all_of = Stages(group, f"inject {name!r}")
    survey, present = all_of.run(lambda: surveyed(model, name))
    whole = all_of.whole(present)

    def checked() -> tuple[Plan, list[Carried]]:
        planned = all_of.planned(config, model, whole, present)
        return planned, places_of_plan(survey, name, planned, present, leave_new=leave_new)

    planned, wanted = all_of.run(checked)
    all_of.put_on(lambda agreed: put_plan_on(survey, name, planned, wanted, probe, agreed))


def plan_of_part(group: Any, survey: Survey, config: ConfigLike) -> Plan:
    """Return what a config does to the part of a model in this process; see `plan`."""
    all_of = Stages(group, "plan")
    present = all_of.run(lambda: inventory(survey))
    whole = all_of.whole(present)
    return all_of.run(lambda: all_of.planned(config, survey.model, whole, present))


def put_on_by_all(
    group: Any, asked: str, fitted: Callable[[Part], tuple[Any, ...]], put_on: Callable[..., None]
) -> None:
    """Put an adapter onto the parts of a model: what `fitted` returns, by `put_on`.

    Both are of `load_adapter` or `install`. `put_on` is given a last check as well.
    """
    all_of = Stages(group, asked)
    fitting = all_of.run(lambda: fitted(all_of.part_of_state))
    all_of.check_complete()
    all_of.put_on(lambda agreed: put_on(*fitting, agreed))


def saved_by_all(
    group: Any,
    asked: str,
    taken: Callable[[], tuple[AdapterState, F]],
    written: Callable[[AdapterState, F], None],
) -> None:
    """Write the parts of all processes in the first one; see `save_adapter`."""
    all_of = Stages(group, asked)
    part, facts = all_of.run(taken)

    def write() -> None:
        state = all_of.whole_state(part)
        if all_of.is_first:
            written(state, facts)

    all_of.run(write)


class Stages:
    """The processes of a group, each of which has other layers of a model."""

    def __init__(self, group: Any, asked: str) -> None:
        distributed = torch.distributed
        is_group = distributed.is_available() and isinstance(group, distributed.ProcessGroup)
        if not is_group or distributed.get_rank(group) < 0:
            problem = f"group is {group!r}, of which this process is no member"
            raise StateError(asked, problem, "Give a group of torch.distributed")
        self.group, self.asked = group, asked
        self.rank = distributed.get_rank(group)
        self.is_first = self.rank == 0
        self._holders: Mapping[str, list[int]] = {}
        self._names: list[str] = []  # of an adapter for the whole model
        self._taken: set[str] = set()  # those of them that are here

    def run(self, work: Callable[[], T]) -> T:
        """Do what may be refused, before anything changes; raise where any process does."""
        try:
            result = work()
        except Exception as error:
            self._all(_text(error))
            raise
        self._refuse_others(self._all(None))
        return result

    def put_on(self, work: Callable[[Callable[[], None]], None]) -> None:
        """Do what changes a model; what fails in one process is undone in all."""
        told: list[bool] = []

        def check() -> None:
            told.append(True)
            self._refuse_others(self._all(None))

        try:
            work(check)
        except Exception as error:
            if not told:
                self._all(_text(error))
            raise

    def whole(self, here: Inventory) -> Inventory:
        """Return the names of all processes, in their order."""
        inventories = self._all(here)
        holders = defaultdict(list)
        for rank, part in enumerate(inventories):
            for name in {**part.parameters, **part.weights}:
                holders[name].append(rank)
        self._holders = holders
        return _union(inventories)

    def planned(
        self, config: ConfigLike, model: nn.Module, whole: Inventory, here: Inventory
    ) -> Plan:
        """Return what of a config, which is asked of the whole model, is for this process."""
        return self.part(resolve(config_of(config, whole, model), whole), here)

    def part(self, plan: Plan, here: Inventory) -> Plan:
        """Return what of a plan for the whole model is for this process.

        Raises:
            MatchError: Several processes have what the plan adapts or trains.
        """
        touched = [canonical(site.weight) for site in plan.sites]
        touched += [trained.name for trained in plan.trained]
        for name in touched:
            if len(ranks := self._holders.get(name, [])) > 1:
                problem = f"processes {', '.join(map(str, ranks))} of the group each have {name!r}"
                remedy = "Exclude it where it is one tensor with copies; give parts the names that "
                remedy += "they have in the whole model; leave group out where each process has all"
                raise MatchError(self.asked, problem, remedy)
        known = {*here.listed, *here.weights}
        sites = tuple(site for site in plan.sites if canonical(site.weight) in known)
        trained = tuple(entry for entry in plan.trained if entry.name in known)
        return replace(plan, sites=sites, trained=trained)

    def part_of_state(self, state: AdapterState, here: Inventory) -> AdapterState:
        """Return what of an adapter for the whole model is for this process."""
        self._names = [*state.sites, *state.trained]
        known = {*here.sites, *here.listed}
        self._taken = {name for name in self._names if name in known}
        return only(state, self._taken)

    def check_complete(self) -> None:
        """Check that some process has taken each part of an adapter.

        Raises:
            FormatError: No process has a layer that the adapter is for.
        """
        everywhere = set().union(*self._all(self._taken))
        missing = [name for name in self._names if name not in everywhere]
        if missing:
            problem = f"no process of the group has {quoted(missing[:3])}"
            remedy = "Load it onto the model that it was made for"
            raise FormatError(self.asked, problem, remedy)

    def whole_state(self, state: AdapterState) -> AdapterState:
        """Return the adapter of all processes, in the first one; its part in the others.

        Raises:
            StateError: Several processes have the same part.
        """
        parts = self._at_first(mapped(state, _on_cpu))
        return _joined(parts, self.asked) if self.is_first else state

    def _all(self, value: T) -> list[T]:
        """Return the value of each process."""
        values: list[Any] = [None] * torch.distributed.get_world_size(self.group)
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def _at_first(self, value: T) -> list[T]:
        """Return the value of each process in the first one, nothing in the others."""
        size = torch.distributed.get_world_size(self.group)
        values: list[Any] | None = [None] * size if self.is_first else None
        first = torch.distributed.get_process_group_ranks(self.group)[0]
        torch.distributed.gather_object(value, values, dst=first, group=self.group)
        return values or []

    def _refuse_others(self, texts: Iterable[str | None]) -> None:
        for rank, text in enumerate(texts):
            if text is not None:
                problem = f"process {rank} of the group refused it: {text}"
                remedy = "Mend it there; nothing has changed in any process"
                raise LayerError(self.asked, problem, remedy)


def _text(error: Exception) -> str:
    known = isinstance(error, LoraInjectError)
    return str(error).rstrip(".") if known else f"{type(error).__name__}: {error}"


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu()


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
