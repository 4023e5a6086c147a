"""What a forward mount adds to the output: which updates take part, looked up at each forward.

One idea: three questions of every forward. Which adapters are active, with their weights? Under
`routed`, which adapter has each row of the batch? And in a compiled graph, where a name would be a
constant: which adapters *could* be chosen, by a tensor that comes in?
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lora_inject.errors import LayerError
from lora_inject.functional import (
    Factors,
    Gathered,
    chosen_factors,
    chosen_rows,
    gather,
    routed_update,
)
from lora_inject.layers.base import Carrier, Entry, Recipe
from lora_inject.layers.selection import State

__all__ = ["ForwardMount"]


class _Routing:
    """A routed batch as one layer sees it, kept until the context ends.

    Attributes:
        rows: `(batch,)`, int64: 0 for the base, else 1 + the place in `entries`.
        entries: The adapters of the batch that are on this layer.
    """

    def __init__(self, rows: Tensor, entries: list[Entry]) -> None:
        self.rows = rows
        self.entries = entries
        self._gathered: Gathered | None = None
        self._of: list[tuple[str, Tensor, int]] = []
        self._dtype: torch.dtype | None = None

    def gathered(self, held: Mapping[str, Tensor | None], dtype: torch.dtype) -> Gathered | None:
        """Return what was gathered, unless a tensor was replaced or written since.

        Args:
            held: The layer's parameters.
            dtype: What is computed in.
        """
        if dtype != self._dtype:
            return None
        for name, tensor, version in self._of:
            if held[name] is not tensor or tensor._version != version:
                return None
        return self._gathered

    def gather(
        self,
        held: Mapping[str, Tensor | None],
        adapters: list[list[Factors]],
        out: int,
        dtype: torch.dtype,
    ) -> Gathered | None:
        """Gather factors for an output of width `out`, and keep them.

        Returns:
            None for tensors of inference mode, which do not tell when they are written.
        """
        names = [name for entry in self.entries for name in entry.names.values()]
        tensors = {name: t for name in names if (t := held[name]) is not None}
        if any(t.is_inference() for t in tensors.values()):
            return None
        self._of = [(name, t, t._version) for name, t in tensors.items()]
        self._dtype = dtype
        self._gathered = gather(self.rows, adapters, out, dtype)
        return self._gathered


class ForwardMount(Carrier):
    """Mixin of the kinds that add to their output."""

    def _lora_updates(self, state: State) -> list[Factors]:
        """Return the low-rank updates that take part under `state`."""
        mounts = self._lora
        recipes = mounts.chosen(state)
        updates = self._lora_factors(recipes) if recipes else []
        if updates and (self.training or mounts.selection.witness is not None):
            self._lora_takes_part(None, (u.A for u in updates))
        return updates

    def _lora_factors(self, recipes: Iterable[Recipe]) -> list[Factors]:
        """Return updates with their tensors, which are looked up anew each time."""
        held, training = self._parameters, self.training
        return [
            Factors(held[r.A], held[r.B], r.scale, r.spans, r.dropout if training else 0.0)  # type: ignore[arg-type]
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
        n_rows = state.choice.shape[0]
        if x.shape[0] not in (n_rows, n_rows * state.repeat):
            multiple = f", nor {state.repeat} times that" if state.repeat > 1 else ""
            raise LayerError(
                f"routed() with {n_rows} rows",
                f"a {type(self).__name__} got an input of shape {tuple(x.shape)}, whose first "
                f"dimension is not the number of rows{multiple}",
                "Give one adapter for each row of the batch; for beams use repeat=n",
            )
        mine = self._lora.forward
        if torch.compiler.is_compiling():
            # Names would be constants of the graph: all adapters stand ready.
            entries = list(mine.values())
            index = chosen_rows(state.choice.to(x.device)[:, 0], self._lora.numbers)
        else:
            rows = state.rows or ()
            entries = [mine[n] for n in dict.fromkeys(rows) if n is not None and n in mine]
            place = {e.adapter: i + 1 for i, e in enumerate(entries)}
            index = torch.tensor([place.get(name or "", 0) for name in rows], device=x.device)
        return _Routing(index.repeat_interleave(x.shape[0] // n_rows), entries)

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
        keep = not (torch.is_grad_enabled() or self.training or torch.compiler.is_compiling())
        held, dtype = self._parameters, self._lora_dtype(y)
        if keep and (gathered := routing.gathered(held, dtype)) is not None:
            return gathered.add(y, x, in_place=in_place)
        adapters = [self._lora_factors(entry.recipes(1.0)) for entry in routing.entries]
        if keep and (gathered := routing.gather(held, adapters, y.shape[-1], dtype)) is not None:
            return gathered.add(y, x, in_place=in_place)
        return routed_update(y, x, routing.rows, adapters, float32=self._lora.float32)

    # ---------------------------------------------------------------------------- compiled graphs

    def _lora_compiled(self, y: Tensor, state: State) -> list[Factors] | None:
        """Return updates chosen by the selection's tensor, which is no constant of a graph.

        Names have to be constants where the choice decides which of several trainable adapters get
        a gradient, since a graph cannot leave one out and zeros would let weight decay move an
        idle adapter; or which dropout there is. They may be where there is nothing to choose.

        Args:
            y: `(..., out)`, the layer's own output.
            state: The running selection.

        Returns:
            None outside of compilation, and where names have to be constants.
        """
        mine = self._lora.forward
        # The tensor tells how many are chosen; a look at `active` would make it a constant.
        if not torch.compiler.is_compiling() or len(mine) < 2 or not state.choice.shape[0]:
            return None
        adapters = [self._lora_factors(entry.recipes(1.0)) for entry in mine.values()]
        n_trained = sum(us[0].A.requires_grad for us in adapters)
        several = max(n_trained, len(self._lora.selection.trained)) > 1
        if n_trained and several and torch.is_grad_enabled():
            return None
        if len({u.dropout for us in adapters for u in us}) > 1:
            return None
        dtype = self._lora_dtype(y)
        return [chosen_factors(state.choice, self._lora.numbers, adapters, y.shape[-1], dtype)]

    def _lora_dtype(self, y: Tensor) -> torch.dtype:
        return torch.float32 if self._lora.float32 and y.dtype != torch.float64 else y.dtype
