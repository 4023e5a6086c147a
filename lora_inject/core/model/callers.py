"""Whether a verb is called by one process, or by several of which each has a part of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from lora_inject.core.spec.rooms import room

if TYPE_CHECKING:
    from lora_inject.core.adapter.state import AdapterState
    from lora_inject.core.spec.inventory import Inventory
    from lora_inject.core.spec.plan import Plan

T = TypeVar("T")


class Alone:
    """A process that has the whole model, as far as a verb is concerned."""

    is_first = True

    def run(self, work: Callable[[], T]) -> T:
        """Do what may be refused, before anything changes."""
        return work()

    def put_on(self, work: Callable[[Callable[[], None]], None]) -> None:
        """Do what changes a model: all or nothing, with a last check that it calls."""
        work(lambda: None)

    def whole(self, here: Inventory) -> Inventory:
        """Return the names of the whole model, for those of this process."""
        return here

    def part(self, plan: Plan, here: Inventory) -> Plan:
        """Return what of a plan for the whole model is for this process."""
        del here
        return plan

    def part_of_state(self, state: AdapterState, here: Inventory) -> AdapterState:
        """Return what of an adapter for the whole model is for this process."""
        del here
        return state

    def check_complete(self) -> None:
        """Check that some process has taken each part of an adapter."""

    def whole_state(self, state: AdapterState) -> AdapterState:
        """Return the adapter of the whole model, for that of this process; in the first one."""
        return state


def callers_of(group: Any, asked: str) -> Alone:
    """Return who calls a verb: this process alone, or the processes of a group."""
    if group is None:
        return Alone()
    return room("stages").Stages(group, asked)  # type: ignore[no-any-return]
