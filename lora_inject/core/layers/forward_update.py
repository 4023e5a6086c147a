"""Kinds of layers that add to their output: what a mix of adapters asks of each.

| method | is | of |
|---|---|---|
| `_lora_mixed` | the output under a mix | here |
| `_lora_with_updates` | the output with a sum of updates | each kind |
| `_lora_with_gain` | the same, and a gain of the outputs as the last step | each kind |
| `_lora_without_updates` | the output of the plain layer | each kind |
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lora_inject.core.functional.factors import Update
from lora_inject.core.layers.adapted import Adapted
from lora_inject.core.layers.attached import Chosen, factors_of, held_by
from lora_inject.core.layers.gains import with_gain
from lora_inject.core.layers.reading import effective_value
from lora_inject.core.layers.replaced import refuse_other_forward
from lora_inject.core.layers.selected import Selected


class ForwardUpdate(Adapted):
    """Mixin of the kinds that add to their output."""

    def _lora_mixed(self, mix: Selected, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the layer with the adapters of a mix."""
        attached = self._lora
        recipes = self._lora_chosen(mix).recipes
        if not recipes:
            return self._lora_without_updates(args, kwargs)
        updates = factors_of(recipes, held_by(self), training=self.training)
        if self.training:
            self._lora_check_vain(t for u in updates for t in (u.A, u.B))
        if attached.gains:
            return with_gain(self, mix, recipes, args, kwargs, updates)
        return self._lora_with_updates(args, kwargs, updates)

    def _lora_chosen(self, mix: Selected) -> Chosen:
        """Return what takes part under a mix; it is looked up when that changes."""
        chosen = self._lora.last_chosen
        if chosen.mix is mix:
            return chosen
        if self._lora_stock and not self.stock(self._lora_plain):
            refuse_other_forward(self)
        return self._lora.choose(mix)

    def _lora_with_updates(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], updates: Sequence[Update]
    ) -> Any:
        """Compute the layer with a sum of updates."""
        raise NotImplementedError

    def _lora_with_gain(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        updates: Sequence[Update],
        gain: Tensor,
    ) -> Any:
        """Compute the layer with a sum of updates, and multiply by a gain `(out,)`."""
        raise NotImplementedError

    def _lora_without_updates(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the layer without its forward updates."""
        raise NotImplementedError

    def _lora_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the first argument of a call, as the layer's own forward would name it."""
        if len(args) == 1 and not kwargs:
            x: Tensor = args[0]
            return x
        bound = inspect.signature(self._lora_plain.forward).bind(self, *args, **kwargs)
        first: Tensor = list(bound.arguments.values())[1]
        return first

    def _lora_own(self, param: str) -> Any:
        """Return a parameter as this layer's own forward uses it: with its weight updates only."""
        if param not in self._lora_reads:
            return getattr(self, param)
        raw = self._lora_raw(param)
        reads = self._lora.reads.get(param)
        if not reads:
            return raw
        return effective_value(self, param, raw, reads)
