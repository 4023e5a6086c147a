"""Mixes of adapters of which some have a gain."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lora_inject.core.layers.attached import Entry
from lora_inject.core.layers.gains import check_mixed
from lora_inject.core.layers.survey import Survey
from lora_inject.core.roots.carried import entries


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
