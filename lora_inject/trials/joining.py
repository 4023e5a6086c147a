"""Put the adapters of trials onto a model, all or none, beside those that are there.

An adapter that is injected becomes the only one that is active and trains; those of trials join.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from lora_inject.core.layers.snapshot import all_or_nothing
from lora_inject.core.layers.weight_kinds import sharded_by
from lora_inject.core.model.inject import put_config
from lora_inject.core.model.read_off import adapter_state
from lora_inject.core.model.training import train_only
from lora_inject.core.roots.root import find_root
from lora_inject.errors import StateError
from lora_inject.rows.seen import note_structure
from lora_inject.trials.run import Place, places_of
from lora_inject.trials.trial import Trial


def put_on(
    model: nn.Module,
    trials: Mapping[str, Trial],
    beside: Iterable[str],
    *,
    leave_new: bool,
) -> dict[str, list[Place]]:
    """Inject the adapters of trials, and return where their tensors are.

    They train, and so do the running trials `beside` them.

    Raises:
        ConfigError: A config is not valid.
        MatchError: A config's pattern matches nothing.
        LayerError: A site cannot be adapted.
        StateError: A name is in use, or the model is sharded. The model is then as it was.
    """
    _refuse_sharded(model)
    found = find_root(model, "Trials")
    known = () if found is None else (found[1], found[1].selection)
    grads = [(p, p.grad) for p in model.parameters()]
    try:
        with all_or_nothing(model.modules(), known):
            for name, trial in trials.items():
                with torch.random.fork_rng():
                    torch.manual_seed(trial.seed)
                    put_config(model, trial.config, name, leave_new=leave_new, alone=False)
            _refuse_dropout(model, trials)
            note_structure(model)
            places = {name: places_of(model, name) for name in trials}
            train_only(model, [*beside, *trials])
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
    return places


def _refuse_sharded(model: nn.Module) -> None:
    """Refuse a model of which this process has a part: a pass would need the others' batches."""
    for name, tensor in model.named_parameters():
        if (how := sharded_by(tensor)) is not None:
            raise StateError(
                "Trials",
                f"this process has a part of {name!r}: {how}",
                "Give each process the whole model, or train the adapters one by one",
            )


def _refuse_dropout(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse dropout on embeddings and convolutions, which do not draw it by trial."""
    for name in names:
        for site, state in adapter_state(model, name).sites.items():
            if state.spec.dropout and state.spec.kind not in {"linear", "conv1d"}:
                raise StateError(
                    f"Trials, {name!r}",
                    f"site {site!r} ({state.spec.kind}) has dropout, which is not drawn by trial",
                    "Give its rule dropout 0",
                )
