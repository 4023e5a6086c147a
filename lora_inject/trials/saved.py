"""Trials in a file: everything that a run needs to go on bit for bit."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_inject.core.adapter.fingerprint import sample_positions
from lora_inject.core.model.read_off import adapter_state
from lora_inject.errors import FormatError, user_path
from lora_inject.formats.pickles import DAMAGE
from lora_inject.trials.flat import Gradient
from lora_inject.trials.gradients import Together
from lora_inject.trials.trial import Trial

Notes = Mapping[str, dict[str, Any]]
"""What is known of each trial: a dict by name, by what it is."""


class Held(NamedTuple):
    """What a file holds.

    Attributes:
        path: For errors.
        about: Numbers and settings.
        tensors: By what they are and by trial.
    """

    path: str
    about: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def trials(self) -> dict[str, Trial]:
        """The trials, which are not on a model yet."""
        return {name: Trial(**kept) for name, kept in self.about["trials"].items()}

    def check_base(self, model: nn.Module) -> None:
        """Check the base under the adapters of the trials, which are on the model now.

        Raises:
            FormatError: It has other values than when they were saved.
        """
        for name in self.about["trials"]:
            if _base_of(model, name) != self.tensors["base"][name]:
                problem = f"the base of trial {name!r} has other values"
                raise FormatError(
                    f"resume {self.path!r}", problem, "Give the model as it was before"
                )


def content_of(
    trials: Mapping[str, Trial], options: Mapping[str, Any], notes: Notes, together: Together
) -> bytes:
    """Return the content of a file with some trials.

    Args:
        trials: Those that are saved.
        options: Of all trials.
        notes: What is known of each trial.
        together: The tensors of the trials.
    """
    about = {"trials": {name: trial.to_dict() for name, trial in trials.items()}, **options}
    for key, by_name in _numbers(notes, together).items():
        about[key] = {name: by_name[name] for name in trials if name in by_name}
    flats = {name: together.flats[name] for name in trials}
    waiting = {name: flat.gradient() for name, flat in flats.items() if name in together.pending}
    held = {
        "about": json.dumps(about),
        "base": {name: _base_of(together.model, name) for name in trials},
        "values": {name: flat.vectors for name, flat in flats.items()},
        "optimizer": {name: together.optimizer.state_of(flat) for name, flat in flats.items()},
        "random": {name: together.random[name] for name in trials},
        "gradients": {name: [*gradient] for name, gradient in waiting.items()},
    }
    content = io.BytesIO()
    torch.save(held, content)
    return content.getvalue()


def held_in(path: str | PathLike[str]) -> Held:
    """Read a file.

    Raises:
        FormatError: `Trials.save` did not write it.
    """
    file = user_path("resume trials", path)
    try:
        held = torch.load(file, weights_only=True, map_location="cpu")
        about = json.loads(held.pop("about"))
    except DAMAGE as error:
        problem = f"it cannot be read: {error}"
        raise FormatError(f"resume {str(path)!r}", problem, "Give what save wrote") from error
    return Held(str(path), about, held)


def restore(held: Held, notes: Notes, together: Together) -> None:
    """Give the trials of a file, which are on the model with other values, what it holds."""
    for name, vectors in held.tensors["values"].items():
        flat = together.flats[name]
        flat.fill(vectors, together.optimizer)
        together.optimizer.restore(flat, held.tensors["optimizer"][name])
        if name in held.tensors["gradients"]:
            flat.set_gradient(Gradient(*held.tensors["gradients"][name]))
    together.random.update(held.tensors["random"])
    for key, by_name in _numbers(notes, together).items():
        by_name.update(held.about[key])
    for name in held.about["stopped"]:
        together.stop(name)


def _numbers(notes: Notes, together: Together) -> dict[str, dict[str, Any]]:
    """Return numbers and words by what they are and by trial."""
    return {**notes, "pending": together.pending}


def _base_of(model: nn.Module, name: str) -> dict[str, list[float]]:
    """Return the fingerprint's samples of an adapter's base, as plain data."""
    mark = adapter_state(model, name).fingerprint or {}
    return {  # not where an adapter moves it, which changes with the adapter
        key: list(known.values[: len(sample_positions(known.shape))])
        for key, known in mark.items()
        if known.values is not None
    }
