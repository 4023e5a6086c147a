"""What a forward update adds to the output: which updates take part, looked up at each forward.

Three questions of every forward. Which adapters are active, with their weights? Under
`routed`, which adapter has each row of the batch? And in a compiled graph, where a name would be a
constant: which adapters *could* be chosen, by a tensor that comes in?
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_inject.errors import LayerError
from lora_inject.functional import (
    Factors,
    Rows,
    chosen_factors,
    chosen_rows,
    routed_update,
    rows_of,
)
from lora_inject.functional.factors import compute_dtype
from lora_inject.layers.adapted import Adapted
from lora_inject.layers.attached import Entry, Recipe, held_by
from lora_inject.layers.selection import State


class _Routing(NamedTuple):
    """A routed batch as one layer sees it: the adapters on this layer, and which each row has."""

    entries: Sequence[Entry]
    rows: Rows | Tensor

    @property
    def places(self) -> Tensor:
        """For each row 0 for the base, else 1 + the place in `entries`."""
        return self.rows if isinstance(self.rows, Tensor) else self.rows.places


_NOTHING = _Routing((), torch.empty(0))


class ForwardUpdate(Adapted):
    """Mixin of the kinds that add to their output."""

    def _lora_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the first argument of a call, as the layer's own forward would name it.

        Raises:
            TypeError: Its forward does not take these arguments.
        """
        if len(args) == 1 and not kwargs:
            found: Tensor = args[0]
            return found
        bound = inspect.signature(self._lora_plain.forward).bind(self, *args, **kwargs)
        first: Tensor = list(bound.arguments.values())[1]
        return first

    def _lora_own(self, param: str) -> Any:
        """Return a parameter as this layer's own forward uses it: with its weight updates only."""
        raw, reads = self._lora_raw(param), self._lora.reads.get(param)
        return self._lora_value(param, raw, reads) if reads else raw

    def _lora_updates(self, state: State) -> list[Factors]:
        """Return the low-rank updates that take part under `state`."""
        attached = self._lora
        recipes = attached.chosen(state)
        updates = self._lora_factors(recipes) if recipes else []
        if updates and (self.training or attached.selection.witness is not None):
            self._lora_takes_part(None, (u.A for u in updates))
        return updates

    def _lora_factors(self, recipes: Iterable[Recipe]) -> list[Factors]:
        """Return updates with their tensors, which are looked up anew each time."""
        held, training = held_by(self), self.training
        return [
            Factors(held[r.A], held[r.B], r.scale, r.spans, r.dropout if training else 0.0)
            for r in recipes
        ]

    # ------------------------------------------------------------------------------- routed rows

    def _lora_routing(self, x: Tensor, state: State) -> _Routing:
        """Return which adapter each row of the input has.

        Raises:
            LayerError: The first dimension of x is not the number of rows, nor its multiple.
        """
        if torch.compiler.is_compiling():
            return self._lora_new_routing(x, state)
        key = (self._lora, x.shape[0], x.device)
        found: _Routing | None = state.kept.get(key)
        if found is None:
            found = state.kept[key] = self._lora_new_routing(x, state)
        if found.entries and (self.training or self._lora.selection.witness is not None):
            self._lora_takes_part(None, (e.tensor(self, "A") for e in found.entries))
        return found

    def _lora_new_routing(self, x: Tensor, state: State) -> _Routing:
        # In a graph the names would be constants, and all adapters stand ready.
        choice = state.choice_on(x.device) if torch.compiler.is_compiling() else None
        names = (state.rows or ()) if choice is None else ()
        n_rows = len(names) if choice is None else choice.shape[0]
        if x.shape[0] not in (n_rows, n_rows * state.repeat):
            multiple = f", nor {state.repeat} times that" if state.repeat > 1 else ""
            raise LayerError(
                f"routed() with {n_rows} rows",
                f"a {type(self).__name__} got an input of shape {tuple(x.shape)}, whose first "
                f"dimension is not the number of rows{multiple}",
                "Give one adapter for each row of the batch; for beams use repeat=n",
            )
        mine = self._lora.forward
        repeat = x.shape[0] // n_rows
        if choice is not None:
            entries, numbers = self._lora_eligible(state)
            if not entries:
                return _NOTHING
            index = chosen_rows(choice[:, 0], numbers).repeat_interleave(repeat)
            return _Routing(entries, index)
        entries = [mine[n] for n in dict.fromkeys(names) if n is not None and n in mine]
        if not entries:
            return _NOTHING
        key = (*(e.adapter for e in entries), x.shape[0], x.device)
        rows = state.kept.get(key)
        if rows is None:
            place = {e.adapter: i + 1 for i, e in enumerate(entries)}
            places = [place.get(name or "", 0) for name in names for _ in range(repeat)]
            rows = state.kept[key] = rows_of(places, x.device)
        return _Routing(entries, rows)

    def _lora_routed(
        self, y: Tensor, x: Tensor, routing: _Routing, *, in_place: bool = False
    ) -> Tensor:
        """Add to each row of y `(batch, ..., out)` the update of its own adapter.

        Args:
            y: The layer's own output.
            x: Its input.
            routing: Which adapter each row has.
            in_place: Whether y may be modified where no gradient is needed: nobody else has it.
        """
        if not routing.entries:
            return y
        adapters, float32 = self._lora_routed_factors(routing), self._lora.float32
        return routed_update(y, x, routing.rows, adapters, float32=float32, in_place=in_place)

    def _lora_routed_factors(self, routing: _Routing) -> list[list[Factors]]:
        """Return the updates of each adapter of the batch."""
        return [self._lora_factors(entry.recipes(1.0)) for entry in routing.entries]

    # ---------------------------------------------------------------------------- compiled graphs

    def _lora_compiled(self, y: Tensor, state: State) -> list[Factors] | None:
        """Return updates chosen by the selection's tensor, which is no constant of a graph.

        Args:
            y: `(..., out)`, the layer's own output.
            state: The running selection.

        Returns:
            None outside of compilation, and where names have to be constants: there is one adapter
            only, or they differ in their dropout.
        """
        # The tensor tells how many are chosen; a look at `active` would make it a constant.
        if not torch.compiler.is_compiling() or len(self._lora.forward) < 2:
            return None
        choice = state.choice_on(y.device)
        entries, numbers = self._lora_eligible(state)
        if not entries or not choice.shape[0]:
            return []
        adapters = [self._lora_factors(entry.recipes(1.0)) for entry in entries]
        if len({u.dropout for us in adapters for u in us}) > 1:
            return None
        dtype = compute_dtype(y.dtype, self._lora.float32)
        return [chosen_factors(choice, numbers, adapters, y.shape[-1], dtype)]

    def _lora_eligible(self, state: State) -> tuple[list[Entry], list[int]]:
        """Return the entries among which a compiled graph chooses, and their numbers.

        Those that train must be constants of a graph where gradients are asked for: it cannot leave
        one out, and a gradient of zeros would let weight decay move an idle adapter.
        """
        held, grad = held_by(self), torch.is_grad_enabled()
        entries, numbers = [], []
        for (name, entry), number in zip(
            self._lora.forward.items(), self._lora.numbers, strict=True
        ):
            trains = any(held[flat].requires_grad for flat in entry.names.values())
            if not (grad and trains) or name in state.parts:
                entries.append(entry)
                numbers.append(number)
        return entries, numbers
