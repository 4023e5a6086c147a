"""Dropout of trials: each draws from its own generator, for its own rows only.

So a trial drops the same elements, whatever other trials run. A checkpoint that recomputes a layer
restores only torch's global generator. So each forward draws a number from the global generator and
stores the states of the trials' generators under it; the recomputation draws the same number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_inject.errors import StateError
from lora_inject.functional import Factors
from lora_inject.functional.routed import dropped


class Draws:
    """The random numbers of one step.

    Args:
        rows: Name and number of rows of each trial, in the order of the batch.
        states: State of each trial's generator; each draw replaces the state.
    """

    def __init__(self, rows: Sequence[tuple[str, int]], states: dict[str, Tensor]) -> None:
        self._rows, self._states = rows, states
        self._known: dict[int, dict[str, Tensor]] = {}

    def __call__(self, x: Tensor, updates: Mapping[str, Factors]) -> Tensor:
        """Return x `(batch, ..., in)` after dropout, which each trial draws for its own rows."""
        if not any(u.dropout for u in updates.values()):
            return x
        key = int(torch.empty((), dtype=torch.int64).random_())  # on the CPU: no device waits
        again = self._known.get(key)
        if again is None and torch._C._current_graph_task_id() != -1:
            raise StateError(
                "a forward that is recomputed in a backward",
                "the checkpoint did not keep the state of the random numbers",
                "Use checkpoints with preserve_rng_state=True",
            )
        states = self._known.setdefault(key, dict(self._states))
        parts = []
        for (name, _), part in zip(
            self._rows, torch.split(x, [n for _, n in self._rows]), strict=True
        ):
            update = updates.get(name)
            if update is None or not update.dropout:
                parts.append(part)
                continue
            with _generator(x.device, states[name]) as left:
                parts.append(dropped(part, update))
            if again is None:
                self._states[name] = left[0]
        return torch.cat(parts)


@contextmanager
def _generator(device: torch.device, state: Tensor) -> Iterator[list[Tensor]]:
    """Draw with a given generator state, and put the new state into the yielded list."""
    source: Any = torch.random if device.type == "cpu" else torch.get_device_module(device)
    before, left = source.get_rng_state(), [state]
    source.set_rng_state(state)
    try:
        yield left
        left[0] = source.get_rng_state()
    finally:
        source.set_rng_state(before)


def seeded(seed: int, device: torch.device) -> Tensor:
    """Return the state of a generator of a device right after it was seeded."""
    return torch.Generator(device).manual_seed(seed).get_state()
