"""Mixes of adapters: their weights, and which adapters can be in one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

from torch import nn

from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.gains import check_mixed
from lora_inject.core.layers.survey import Survey
from lora_inject.core.roots.carried import entries
from lora_inject.errors import StateError, check_type


def weights_of(which: str | Mapping[str, float] | None, verb: str) -> dict[str, float]:
    """Return the weights of a name, of a mix, or of nothing."""
    if which is None or isinstance(which, str):
        return {} if which is None else {which: 1.0}
    check_type(verb, which, Mapping, "Give a name, a mapping of names to weights, or None")
    for name, weight in which.items():
        asked = f"{verb} {name!r}"
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise StateError(asked, f"its weight is {weight!r}", "Give a finite number")
    return {name: float(weight) for name, weight in which.items()}


def check_mixes(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Raise if an adapter with a gain would not be alone at a site, with weight 1."""
    if len(weights) == 1 and 1.0 in weights.values():
        return
    taking: dict[tuple[int, str], list[tuple[Entry, float]]] = {}
    survey = Survey(model)
    for name, weight in weights.items():
        for _, module, entry in entries(survey, name):
            taking.setdefault((id(module), entry.param), []).append((entry, weight))
    for each in taking.values():
        check_mixed(each)
