"""Put the adapters of trials onto a model, all or none, beside those that are there.

An adapter that is injected becomes the only one that is active and trains. Trials that join others
must change neither, so both are put back as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_inject.core.layers.plain_tensors import sharded_by
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.eject import eject
from lora_inject.core.model.inject import inject
from lora_inject.core.model.read_off import adapter_state
from lora_inject.core.model.train import train_only
from lora_inject.core.roots.carried import adapted_modules, entries, root_at
from lora_inject.core.spec.names import joined
from lora_inject.errors import StateError
from lora_inject.rows.kept import routes_rows
from lora_inject.rows.time_major import note_time_major
from lora_inject.trials.flat import Placement
from lora_inject.trials.in_pass import runs_apart
from lora_inject.trials.trial import Trial


def put_on(
    model: nn.Module,
    trials: Mapping[str, Trial],
    beside: Iterable[str],
    like: Tensor | None,
    *,
    leave_new: bool,
) -> dict[str, list[Placement]]:
    """Inject the adapters of trials, and return where their tensors are.

    They train, and so do the running trials `beside` them, whose tensors are of the dtype and
    device of `like`.

    Raises:
        ConfigError: A config is not valid.
        MatchError: A config's pattern matches nothing.
        LayerError: A site cannot be adapted.
        StateError: A name is in use, the model is sharded, rows cannot differ in a weight, or
            tensors are of two dtypes or devices. The model is then as it was.
    """
    _refuse_sharded(model)
    done: list[str] = []
    with _as_it_was_if_it_fails(model, done):
        for name, trial in trials.items():
            with torch.random.fork_rng():
                torch.manual_seed(trial.seed)
                inject(model, trial.config, name, leave_new=leave_new)
            done.append(name)
        _refuse_shared(model, done)
        _refuse_dropout(model, done)
        note_time_major(Survey(model))
        places = {name: _places_of(model, name) for name in done}
        _refuse_kinds(like, places)
        train_only(model, [*beside, *done])
    return places


@contextmanager
def _as_it_was_if_it_fails(model: nn.Module, done: list[str]) -> Iterator[None]:
    """Take adapters off again where the body raises. What is active stays so in any case."""
    record = root_at(Survey(model))
    setting = None if record is None else record.selection.setting
    trained = frozenset[str]() if record is None else frozenset(record.trainable)
    required = {} if record is None else dict(record.required_grad)
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for name in done:
            eject(model, name)
        if record is not None:
            train_only(model, trained)
            record.required_grad = required
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        raise
    finally:
        if record is not None and setting is not None:
            record.selection.replace(setting)


def _refuse_kinds(like: Tensor | None, places: Mapping[str, list[Placement]]) -> None:
    """Refuse tensors that cannot lie in one memory."""
    tensors: list[Tensor] = [place.held for each in places.values() for place in each]
    if like is not None:
        tensors.append(like)
    kinds = {f"{tensor.dtype} on {tensor.device}" for tensor in tensors}
    if len(kinds) > 1:
        problem = f"their tensors are {' and '.join(sorted(kinds))}"
        raise StateError("Trials", problem, "Adapt layers of one dtype on one device")


def _places_of(model: nn.Module, name: str) -> list[Placement]:
    """Return where the trained tensors of an adapter are."""
    return [
        Placement(module, flat, role, module._parameters[flat])  # type: ignore[arg-type]
        for _, module, entry in entries(Survey(model), name)
        for role, flat in entry.names.items()
        if entry.trains(role)
    ]


def _refuse_sharded(model: nn.Module) -> None:
    """Refuse a model of which this process has a part: a pass would need the others' batches."""
    for name, tensor in model.named_parameters():
        if (how := sharded_by(tensor)) is not None:
            raise StateError(
                "Trials",
                f"this process has a part of {name!r}: {how}",
                "Give each process the whole model, or train the adapters one by one",
            )


def _refuse_shared(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse what cannot differ by row: weights of modules whose rows cannot run apart."""
    for path, module, attached in adapted_modules(Survey(model)):
        for entry in (entry for name in names for entry in attached.entries(name)):
            reads = attached.forward.get(entry.adapter) is not entry
            if reads and not routes_rows(module, entry) and not runs_apart(module):
                raise StateError(
                    f"Trials, {entry.adapter!r}",
                    f"it changes {joined(path, entry.param)!r}, and the forward of a "
                    f"{type(module).__name__} takes more than one tensor with the rows first",
                    "Leave it out of the config, or train that adapter by itself",
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
