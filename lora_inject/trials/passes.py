"""One pass of the base for several trials: the tokens and the random numbers of each.

A trial drops the same elements, whatever other trials run. A checkpoint that recomputes a layer
restores only torch's global generator. So each forward draws a number from the global generator and
stores the states of the trials' generators under it; the recomputation draws the same number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_inject.core.adapter.generators import generators_of
from lora_inject.core.functional.torch_inside import in_backward
from lora_inject.core.layers.attached import held_by
from lora_inject.errors import LayerError, StateError
from lora_inject.rows.bank import dropped
from lora_inject.trials.batches import Joined
from lora_inject.trials.counts import REMEDY, widths_of
from lora_inject.trials.flat import Buffer
from lora_inject.trials.ranges import TokenRange


class Pass:
    """What layers need to know of one pass.

    Args:
        of: The joined batch.
        buffer: The memory of the trials' tensors.
        random: State of each trial's generator, replaced by each draw; None for no dropout.

    Attributes:
        packed: Whether the batch is packed.
        drops: Whether adapters drop, in any mode of the base.
    """

    def __init__(self, of: Joined, buffer: Buffer, random: dict[str, Tensor] | None) -> None:
        self.packed, self._of = of.packed, of
        self._names, self._each = tuple(of.sizes), list(of.sizes.values())
        self._total, self._tokens = sum(self._each), dict[int, tuple[int, ...]]()
        self._buffer, self._random, self.drops = buffer, random, random is not None
        self._known: dict[int, dict[str, Tensor]] = {}
        self._asked = f"Trials with {self._total} {'tokens' if self.packed else 'rows'}"
        self._counts = of.counts
        self._widths = () if self.packed or of.counts is None else widths_of(of.batch)

    def only(self, name: str | None, n: int) -> Pass:
        """Return the pass of n rows of one trial by themselves; it draws the same numbers."""
        made = copy.copy(self)
        made._names, made._each, made._total, made._tokens = (str(name),), [n], n, {}
        made._counts, made._asked = None, f"Trials with {n} rows"
        return made

    def of_layer(
        self, layer: Any, x: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, list[TokenRange], Tensor, Callable[[], None]]:
        """Return what `ranged_linear` takes.

        Args:
            layer: The adapted layer.
            x: Its input `(rows, ..., in)`.
            dtype: Of the product.

        Returns:
            x after dropout, the ranges of its tokens, the anchor, and what notes a gradient.
        """
        stacked = self._buffer.stacked(layer._lora, held_by(layer), self._names, dtype)
        kept = self.dropped(layer, x, stacked.dropout) if stacked.dropout else x
        ranges = stacked.ranges(self._sizes(layer, x))
        return (
            kept,
            ranges,
            self._buffer.anchor,
            partial(self._buffer.note, stacked.trained),
        )

    def check(self, layer: Any, x: Tensor) -> None:
        """Refuse an input of a layer that does not hold the tokens of each row, one after another.

        Raises:
            LayerError: It has another number of tokens.
        """
        n, total = x.shape[0], self._total
        if n % total:
            problem = f"a {type(layer).__name__} got an input of shape {tuple(x.shape)}"
            raise LayerError(self._asked, problem, REMEDY)
        if self._counts is not None and x.dim() < (3 if x.is_floating_point() else 2):
            self._counts.check(layer, n // total, self._widths, self._asked)

    def _sizes(self, layer: Any, x: Tensor) -> tuple[int, ...]:
        """Return the tokens that each trial has of a layer's input."""
        self.check(layer, x)
        tokens = x.numel() // x.shape[-1]
        if tokens not in self._tokens:
            self._tokens[tokens] = tuple([tokens // self._total * n for n in self._each])
        return self._tokens[tokens]

    def dropped(self, layer: Any, x: Tensor, dropout: Mapping[str, float]) -> Tensor:
        """Return x `(batch, ..., in)` after dropout, which each trial draws for its own tokens."""
        if self._random is None or not any(dropout.values()):
            return x
        key = int(torch.empty((), dtype=torch.int64, device="cpu").random_())  # no device waits
        again = self._known.get(key)
        if again is None and in_backward():
            raise StateError(
                "a forward that is recomputed in a backward",
                "the checkpoint did not keep the state of the random numbers",
                "Use checkpoints with preserve_rng_state=True",
            )
        states = self._known.setdefault(key, dict(self._random))
        each = torch.split(x.reshape(-1, x.shape[-1]), list(self._sizes(layer, x)))
        parts = []
        for name, n, part in zip(self._names, self._each, each, strict=True):
            p = dropout.get(name, 0.0)
            if not p:
                parts.append(part)
                continue
            with _generator(x.device, states[name]) as left:
                parts.append(self._dropped(layer, x, name, part.view(n, -1, x.shape[-1]), p))
            if again is None:
                self._random[name] = left[0]
        return torch.cat(parts).view(x.shape)

    def _dropped(self, layer: Any, x: Tensor, name: str, part: Tensor, p: float) -> Tensor:
        """Drop elements of one trial's rows `(rows, positions, in)`, of those not padded only."""
        of, n = self._of, part.shape[1]
        fixed = None if of.padding is None else of.padding.fixed.get(layer)
        if of.padding is None or (fixed is not None and n in {fixed, *of.shared}):
            return dropped(part, p).flatten(0, 1)
        assert of.lengths is not None
        longest, own = max(of.lengths.values()), of.lengths[name]
        if layer not in of.padding.layers or n != longest:
            raise LayerError(
                "dropout on rows of unequal lengths",
                f"a {type(layer).__name__} got an input of shape {tuple(x.shape)}, whose second "
                f"dimension is not the {longest} positions",
                "Give rows of one length",
            )
        kept = dropped(part[:, :own], p)
        return F.pad(kept, (0, 0, 0, longest - own)).flatten(0, 1)


@contextmanager
def _generator(device: torch.device, state: Tensor) -> Iterator[list[Tensor]]:
    """Draw with a given generator state, and put the new state into the yielded list."""
    source = generators_of([device])[-1]
    before, left = source.get_state(), [state]
    source.set_state(state)
    try:
        yield left
        left[0] = source.get_state()
    finally:
        source.set_state(before)


def seeded(seed: int, device: torch.device) -> Tensor:
    """Return the state of a generator of a device right after it was seeded."""
    return torch.Generator(device).manual_seed(seed).get_state()
