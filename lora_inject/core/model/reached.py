"""Which adapters take part when a model runs: an adapter that no forward reaches is inert.

Layers note which of their adapters took part; this module compares the notes of one run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_inject.core.layers.survey import Survey, evaluating
from lora_inject.core.roots.carried import adapted_modules, check_unmerged, entries, reach
from lora_inject.core.spec.names import counted
from lora_inject.errors import LayerError, StateError


def unreached(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    r"""Return the sites whose adapter did not take part when `run()` ran the model.

    Args:
        model: The root, or any module that holds roots.
        run: Runs the model, for instance `lambda: model(**batch)`.

    Returns:
        Names of sites of active adapters that no forward reached; empty when all took part. A
        layer that is neither called nor read shows up here.

    Raises:
        StateError: The model is merged or carries no active adapter.
    """
    reached = reach(model)
    check_unmerged("unreached", *reached.selections)
    active = {name for selection in reached.selections for name in selection.current().names}
    if not active:
        raise StateError("unreached", "no adapter is active", "Call activate(model, name) first")
    return list(dict.fromkeys(_missed_sites(model, run)))


def refuse_unreached(model: nn.Module, probe: Callable[[], Any]) -> None:
    """Check that a run in eval mode, without gradients, reaches all sites of active adapters."""
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices):
        missed = _missed_sites(model, probe)
    if missed:
        some = ", ".join(map(repr, missed[:3]))
        raise LayerError(
            f"inject, site {missed[0]!r}",
            "the probe neither reached its layer nor read its weight "
            f"({counted(len(missed), 'such site')}: {some}): its adapter would be inert",
            "Leave it out of the adapter",
        )


def _missed_sites(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Return the sites of active adapters that took no part when `run()` ran the model."""
    survey = Survey(model)
    states = {one: one.current() for one in reach(model, survey).selections}
    carried = {id(m): (a, a.took_part) for _, m, a in adapted_modules(survey)}
    for attached, _ in carried.values():
        attached.forget_use()
    for selected in states.values():
        selected.forget_use()
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled graphs do not note anything
            run()
        return [
            item.name
            for item in entries(survey)
            for attached in (carried[id(item.module)][0],)
            if item.entry.adapter in states[attached.selection].names
            and item.entry.mark not in attached.took_part
        ]
    finally:
        for attached, before in carried.values():
            attached.took_part |= before
