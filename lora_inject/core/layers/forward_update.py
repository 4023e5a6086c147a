"""The updates that a forward update adds to the output, looked up at each forward.

There are three cases. Usually the active adapters take part, with their weights. Under `routed`
each row of the batch has its own adapter. In a compiled graph, in which a name would be a constant,
an input tensor chooses among all adapters that could take part.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lora_inject.core.functional.factors import Factors, compute_dtype
from lora_inject.core.functional.gain import updated_norms
from lora_inject.core.layers.adapted import Adapted
from lora_inject.core.layers.attached import Entry, Recipe, factors_of, held_by
from lora_inject.core.layers.plain_tensors import PLAIN, is_quantized
from lora_inject.core.layers.selection import State
from lora_inject.core.layers.sending import queue_of
from lora_inject.core.layers.weight_kinds import (
    UNKNOWN,
    dense,
    weight_kind,
)
from lora_inject.errors import LayerError, article
from lora_inject.rows.routed import chosen_factors, routed_update
from lora_inject.rows.routing import Routing, eligible, routing_of


class ForwardUpdate(Adapted):
    """Mixin of the kinds that add to their output."""

    def _lora_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the first argument of a call, as the layer's own forward would name it."""
        if len(args) == 1 and not kwargs:
            found: Tensor = args[0]
            return found
        bound = inspect.signature(self._lora_plain.forward).bind(self, *args, **kwargs)
        first: Tensor = list(bound.arguments.values())[1]
        return first

    def _lora_own(self, param: str) -> Any:
        """Return a parameter as this layer's own forward uses it: with its weight updates only."""
        if param not in self._lora_reads:
            return getattr(self, param)
        raw, reads = self._lora_raw(param), self._lora.reads.get(param)
        return self._lora_value(param, raw, reads) if reads else raw

    def _lora_formed(self) -> Any:
        """Return the weight with all updates: for DTensors without in-place addition."""
        attached = self._lora
        entries = {**attached.forward, **attached.reads.get(self.weight_name, {})}
        return self._lora_value(self.weight_name, self._lora_raw(self.weight_name), entries)

    def _lora_updates(self, state: State, *, compiling: bool) -> list[Factors]:
        """Return the low-rank updates that take part under `state`."""
        # The look into the cache is here, as a call of a function costs more.
        known, recipes = (None, ()) if compiling else self._lora.last_chosen
        if known is not state:
            recipes = self._lora.chosen(state, compiling)
        if not recipes:
            return []
        updates = factors_of(recipes, held_by(self), training=self.training)
        if self.training:
            self._lora_refuse_vain(t for u in updates for t in (u.A, u.B))
        return updates

    # ------------------------------------------------------------------------------- routed rows

    def _lora_routing(self, x: Tensor, state: State) -> Routing:
        """Return which adapter each row of the input has."""
        mine = self._lora.forward
        if torch.compiler.is_compiling():
            return routing_of(self, mine, x, state)
        shape = x.shape if self._lora.time_major else x.shape[:1]
        key = (self._lora, shape, queue_of(x.device))
        found: Routing | None = state.kept.get(key)
        if found is None:
            found = state.kept[key] = routing_of(self, mine, x, state)
            self._lora.used(found.entries)
        self._lora_refuse_vain(t for e in found.entries for t in e.tensors(self).values())
        return found

    def _lora_routed(
        self, y: Tensor, x: Tensor, routing: Routing, state: State, *, in_place: bool = False
    ) -> Tensor:
        """Add to each row of y `(batch, ..., out)` the update of its own adapter."""
        if not routing.entries:
            return y
        trains = self.training or state.one_pass is not None
        adapters = routing.factors(held_by(self), training=trains)
        if state.one_pass is not None:
            one = {
                e.adapter: us[0].dropout for e, us in zip(routing.entries, adapters, strict=True)
            }
            x = state.one_pass.dropped(self, x, one)
            adapters = [[u._replace(dropout=0.0) for u in us] for us in adapters]
        blocks = routing.places if routing.blocks is None else routing.blocks
        return routed_update(
            y,
            x,
            blocks,
            adapters,
            float32=self._lora.float32,
            in_place=in_place,
            in_order=routing.in_order,
        )

    # ------------------------------------------------------------------------------------- gains

    def _lora_gain(self, entry: Entry, weight: Any, recipes: Iterable[Recipe]) -> Tensor:
        """Return the gains of an adapter's outputs `(out,)`, with a gradient to its magnitude."""
        if is_quantized(weight) and weight_kind(self, weight) is not UNKNOWN:
            weight = dense(self, weight)
        elif type(weight) not in PLAIN:
            raise LayerError(
                f"a forward of site {entry.spec.name!r}",  # type: ignore[union-attr]
                f"its gain needs the norms of W, which is {article(type(weight).__name__)} here",
                "Shard with fully_shard (FSDP2), or train this layer with variant: lora",
            )
        gain, transposed = entry.gain(held_by(self)), self.geometry(self).transposed
        assert gain is not None
        updates = factors_of(recipes, held_by(self), training=False)
        return gain.of(updated_norms(weight, updates, transposed))

    def _lora_gains(self, routing: Routing, weight: Any, n_dims: int) -> Tensor | None:
        """Return the gains of each row of a batch, `(batch, 1, ..., out)`; None where all are 1."""
        both = enumerate(zip(routing.entries, routing.recipes, strict=True))
        found = {i: self._lora_gain(e, weight, rs) for i, (e, rs) in both if e.variant.gained}
        if not found:
            return None
        ones = torch.ones_like(next(iter(found.values())))
        gains = [ones, *(found.get(i, ones) for i in range(len(routing.entries)))]
        each = torch.stack(gains).index_select(0, routing.places)
        return each.view(-1, *[1] * (n_dims - 2), each.shape[-1])

    # ---------------------------------------------------------------------------- compiled graphs

    def _lora_compiled(self, y: Tensor, state: State) -> list[Factors]:
        """Return updates chosen by the selection's tensor, which is not a constant of a graph.

        Names are constants where there is one adapter only, one has a gain, or dropouts differ. `y`
        is the layer's own output.
        """
        # The tensor tells how many are chosen; a look at `active` would make it a constant.
        if len(self._lora.forward) < 2 or self._lora.gains:
            return self._lora_updates(state, compiling=True)
        choice = state.choice_on(y.device)
        entries, numbers = eligible(self, self._lora.forward, state)
        if not entries or not choice.shape[0]:
            return []
        held, training = held_by(self), self.training
        adapters = [factors_of(entry.recipes(1.0), held, training=training) for entry in entries]
        if len({u.dropout for us in adapters for u in us}) > 1:
            return self._lora_updates(state, compiling=True)
        dtype = compute_dtype(y.dtype, self._lora.float32)
        return [chosen_factors(choice, numbers, adapters, y.size(-1), dtype)]
