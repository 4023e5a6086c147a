"""Which adapters can be others for each row, by what they are on a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from lora_inject.core.layers.attached import Attached, Entry
from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.linear_kinds import LoRALinear
from lora_inject.core.layers.survey import Survey
from lora_inject.core.roots.carried import Reach, adapted_modules, reach
from lora_inject.core.spec.names import joined
from lora_inject.rows.convolution import adds_rows
from lora_inject.rows.expert_rows import sorts_tokens
from lora_inject.rows.time_major import note_time_major

_ROWWISE = {nn.Linear.forward, nn.LayerNorm.forward, nn.RMSNorm.forward}
"""Forwards that treat the rows of their input alike."""

_WHY_NOT: WeakKeyDictionary[Reach, Mapping[str, tuple[str, str]]] = WeakKeyDictionary()
Carrying = tuple[str, nn.Module, Attached]


def adds_bias(cls: Any, param: str) -> bool:
    """Whether what a swapped class reads as its bias can be added to its output for each row."""
    return param == "bias" and issubclass(cls._lora_mixin, LoRALinear)


def is_rowwise(plain: Any) -> bool:
    """Whether a class treats the rows of its input alike."""
    return plain.forward in _ROWWISE


def routes_rows(module: nn.Module, entry: Entry) -> bool:
    """Whether an adapter that reads a parameter of a module can be another for each row."""
    cls: Any = type(module)
    if entry.spec is not None:
        if entry.spec.experts is not None and sorts_tokens(module):
            return True
        return not entry.gained and adds_rows(cls._lora_plain, entry.param)
    if adds_bias(cls, entry.param):
        return True
    return entry.rows is None and entry.scale is None and is_rowwise(cls._lora_plain)


def why_not_routed(model: nn.Module) -> Mapping[str, tuple[str, str]]:
    """Return why adapters cannot be others for each row, and what to do, by the adapter.

    The answer is kept until the next inject or eject.
    """
    known = _WHY_NOT.get(reach(model))
    if known is None:
        survey = Survey(model)
        note_time_major(survey)
        carrying = [*adapted_modules(survey)]
        known = {**_of_experts(survey, carrying), **_of_shared_weights(carrying)}
        _WHY_NOT[reach(model)] = known
    return known


def _of_shared_weights(carrying: Iterable[Carrying]) -> dict[str, tuple[str, str]]:
    """Return the adapters that change what all rows of a batch share."""
    remedy = "Route adapters on layers that are called, and train in full only linear layers and "
    return {
        entry.adapter: (
            f"it changes {joined(path, entry.param)!r} itself, which all rows of a batch share",
            f"{remedy}norms",
        )
        for path, module, attached in carrying
        for table in attached.reads.values()
        for entry in table.values()
        if not routes_rows(module, entry)
    }


def _of_experts(survey: Survey, carrying: Sequence[Carrying]) -> dict[str, tuple[str, str]]:
    """Return the adapters on experts whose tokens nobody can tell the rows of.

    A stack gets the tokens of all rows, one row after another, so a layer that gets whole rows has
    to see that the batch has them. Experts that are layers get tokens that a router has picked.
    """
    mixtures = inventory(survey).mixtures
    picked = {name for mixture in mixtures for name in mixture.experts}
    reasons = {}
    if not any(attached.forward and path not in picked for path, _, attached in carrying):
        problem = "only stacks of experts are adapted, and they do not see what is a row"
        remedy = "Adapt a layer that is called with the batch as well, such as q_proj"
        stacks = (table for _, m, at in carrying if sorts_tokens(m) for table in at.reads.values())
        reasons = {adapter: (problem, remedy) for table in stacks for adapter in table}
    for path, _, attached in carrying:
        if path in picked:
            problem = f"{path!r} gets tokens that a router has picked, of which none has a row"
            remedy = "Leave experts that are layers out of adapters that are routed"
            reasons |= dict.fromkeys(attached.forward, (problem, remedy))
    return reasons
