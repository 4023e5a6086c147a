"""A routed batch as one layer sees it: which of its adapters each row has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.core.functional import Factors
from lora_inject.core.layers.attached import Entry, Recipe, attached_to, factors_of, held_by
from lora_inject.core.layers.selection import State
from lora_inject.core.layers.sending import queue_of, sent
from lora_inject.errors import LayerError
from lora_inject.rows.routed import chosen_rows


class Routing(NamedTuple):
    """The adapters of a batch that are on a layer, and which each row has."""

    entries: Sequence[Entry]
    places: Tensor  # `(batch,)`, int64: 0 for the base, else 1 + the place in `entries`
    recipes: Sequence[Sequence[Recipe]] = ()
    # `places` with one for each run of rows of one adapter where all runs are equally long
    blocks: Tensor | None = None
    in_order: bool = False  # whether `blocks` has each entry once, in their order

    def factors(self, held: Mapping[str, Any], *, training: bool) -> list[list[Factors]]:
        """Return the updates of each adapter."""
        return [factors_of(recipes, held, training=training) for recipes in self.recipes]


NOTHING = Routing((), torch.empty(0))


def routing_of(
    module: nn.Module, by_adapter: Mapping[str, Entry], x: Tensor, state: State
) -> Routing:
    """Return which adapter each row of a layer's input, rows first, has."""
    # In a graph the names would be constants, and all adapters stand ready.
    choice = state.choice_on(x.device) if torch.compiler.is_compiling() else None
    names = (state.rows or ()) if choice is None else ()
    n_rows = len(names) if choice is None else choice.shape[0]
    fits = x.shape[0] in (n_rows, n_rows * state.repeat)
    if not fits and (state.one_pass is None or x.shape[0] % n_rows):
        multiple = f", nor {state.repeat} times that" if state.repeat > 1 else ""
        raise LayerError(
            f"routed() with {n_rows} rows",
            f"a {type(module).__name__} got an input of shape {tuple(x.shape)}, whose first "
            f"dimension is not the number of rows{multiple}",
            "Give one adapter for each row of the batch; for beams use repeat=n",
        )
    if state.one_pass is not None and not torch.compiler.is_compiling():
        state.one_pass.check(module, x)
    attached = attached_to(module)
    if attached is not None and attached.time_major:
        _refuse_ambiguous(module, x, n_rows * state.repeat, n_rows)
    repeat = x.shape[0] // n_rows
    if choice is not None:
        entries, numbers = eligible(module, by_adapter, state)
        if not entries:
            return NOTHING
        places = chosen_rows(choice[:, 0], numbers).repeat_interleave(repeat)
        return _routing(entries, places)
    entries = [by_adapter[n] for n in state.parts if n in by_adapter]
    if not entries:
        return NOTHING
    key = (*(e.adapter for e in entries), x.shape[0], queue_of(x.device))
    known: tuple[Tensor, Tensor, bool] | None = state.kept.get(key)
    if known is None:
        place = {e.adapter: i + 1 for i, e in enumerate(entries)}
        each = [place.get(n or "", 0) for n in names for _ in range(repeat)]
        run = math.gcd(*(len(list(rows)) for _, rows in groupby(each)))
        blocks = each[::run]
        in_order = blocks == list(place.values())
        known = sent(each, x.device), sent(blocks, x.device), in_order
        state.kept[key] = known
    return _routing(entries, *known)


def _refuse_ambiguous(module: nn.Module, x: Tensor, *n_rows: int) -> None:
    """Raise where time, before or after the batch, is as long as the batch."""
    if x.dim() > (2 if x.is_floating_point() else 1) and x.shape[1] in n_rows:
        raise LayerError(
            f"routed() with {n_rows[-1]} rows",
            f"a {type(module).__name__} got an input of shape {tuple(x.shape)} next to a layer "
            "with batch_first=False: which dimension is the batch cannot be told",
            "Give batch_first=True, or pad the batch to another length",
        )


def _routing(
    entries: Sequence[Entry], places: Tensor, blocks: Tensor | None = None, in_order: bool = False
) -> Routing:
    recipes = [tuple(entry.recipes(1.0)) if entry.spec else () for entry in entries]
    return Routing(entries, places, recipes, places if blocks is None else blocks, in_order)


def eligible(
    module: nn.Module, by_adapter: Mapping[str, Entry], state: State
) -> tuple[list[Entry], list[int]]:
    """Return the entries among which a compiled graph chooses, and their numbers.

    Those that train must be constants of a graph where gradients are asked for: it cannot leave one
    out, and a gradient of zeros would let weight decay move an idle adapter.
    """
    attached, held, grad = attached_to(module), held_by(module), torch.is_grad_enabled()
    assert attached is not None
    entries, numbers = [], []
    for name, entry in by_adapter.items():
        trains = any(held[flat].requires_grad for flat in entry.names.values())
        if not (grad and trains) or name in state.parts:
            entries.append(entry)
            numbers.append(attached.selection.number(name))
    return entries, numbers
