"""One pass of the base for several trials: the tokens and the random numbers of each.

A trial drops the same elements, whatever other trials run. A checkpoint that recomputes a layer
restores only torch's global generator. So each forward draws a number from the global generator and
stores the states of the trials' generators under it; the recomputation draws the same number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lora_inject.errors import LayerError, StateError
from lora_inject.functional.ranges import Range
from lora_inject.functional.routed import dropped
from lora_inject.layers.attached import held_by
from lora_inject.trials.flat import Buffer


class Pass:
    """What layers need to know of one pass.

    Args:
        rows: Name and number of rows of each trial, in the order of the batch.
        buffer: The memory of the trials' tensors.
        random: State of each trial's generator, replaced by each draw; None for no dropout.
    """

    def __init__(
        self, rows: Mapping[str, int], buffer: Buffer, random: dict[str, Tensor] | None
    ) -> None:
        self._names, self._rows = tuple(rows), list(rows.values())
        self._buffer, self._random = buffer, random
        self._known: dict[int, dict[str, Tensor]] = {}

    def of_layer(
        self, layer: Any, x: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, list[Range], Tensor]:
        """Return what `ranged_linear` takes.

        Args:
            layer: The adapted layer.
            x: Its input `(rows, ..., in)`.
            dtype: Of the product.

        Returns:
            x after dropout, the ranges of its tokens, and the anchor.
        """
        if x.shape[0] % sum(self._rows):
            raise LayerError(
                f"Trials with {sum(self._rows)} rows",
                f"a {type(layer).__name__} got an input of shape {tuple(x.shape)}, whose first "
                "dimension is not the number of rows",
                "Use a forward that keeps the rows, one after the other",
            )
        found = self._buffer.stacked(layer._lora, held_by(layer), self._names, dtype)
        kept = self.dropped(x, found.dropout) if layer.training else x
        sizes = self._sizes(x.numel() // x.shape[-1])
        starts, ranges = [0, *accumulate(sizes)], []
        for first, one in found.stacks:
            n = len(one.A)
            equal = len(set(sizes[first : first + n])) == 1
            for i in range(0, n, n if equal else 1):
                part = one if equal else one.part(i)
                ranges.append(
                    part._replace(tokens=(starts[first + i], starts[first + i + len(part.A)]))
                )
        return kept, ranges, self._buffer.anchor

    def _sizes(self, n_tokens: int) -> list[int]:
        each = n_tokens // sum(self._rows)
        return [each * n for n in self._rows]

    def dropped(self, x: Tensor, dropout: Mapping[str, float]) -> Tensor:
        """Return x `(batch, ..., in)` after dropout, which each trial draws for its own rows."""
        if self._random is None or not any(dropout.values()):
            return x
        key = int(torch.empty((), dtype=torch.int64, device="cpu").random_())  # no device waits
        again = self._known.get(key)
        if again is None and torch._C._current_graph_task_id() != -1:
            raise StateError(
                "a forward that is recomputed in a backward",
                "the checkpoint did not keep the state of the random numbers",
                "Use checkpoints with preserve_rng_state=True",
            )
        states = self._known.setdefault(key, dict(self._random))
        parts = []
        for name, part in zip(self._names, torch.split(x, self._sizes(len(x))), strict=True):
            p = dropout.get(name, 0.0)
            if not p:
                parts.append(part)
                continue
            with _generator(x.device, states[name]) as left:
                parts.append(dropped(part, p))
            if again is None:
                self._random[name] = left[0]
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
