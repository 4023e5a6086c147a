"""The rows of one pass of several trials, as a way of taking part.

A trial's dropout is a function of its seed, the number of its pass and the layer. So it is the same
whoever else trains, and in a checkpoint that recomputes, and draws from no generator of others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_inject.core.functional.factors import Update
from lora_inject.core.functional.gain import gained
from lora_inject.core.functional.plain_operations import add_updates
from lora_inject.core.layers.attached import factors_of, held_by
from lora_inject.core.layers.kinds import LoRALinear, gain_in_forward, gained_entry
from lora_inject.core.layers.selection import Mix, Selected
from lora_inject.rows.by_row import Rows, Taking
from lora_inject.trials.batches import Joined


class TrialRows(Rows):
    """The trial of each row of a pass.

    Args:
        of: The joined batch.
        seeds: What the dropout of each trial follows from; None for no dropout.
        numbers: The number of each module.
        lengths: For each layer what it got for each row in the first pass, and the widths of that
            batch. It must go on so.
    """

    asked = "Trials.step"

    def __init__(
        self,
        of: Joined,
        seeds: Mapping[str, int] | None,
        numbers: Mapping[nn.Module, int],
        lengths: dict[nn.Module, tuple[int, tuple[int, ...]]],
    ) -> None:
        super().__init__([n for n, size in of.sizes.items() for _ in range(size)], packed=of.packed)
        self.of, self.seeds, self.numbers, self.lengths = of, seeds, numbers, lengths
        (lone, *others) = of.sizes
        self.lone = None if others else lone
        self._whole = Mix({lone: 1.0})

    # ------------------------------------------------------------------------------------ seams

    def forward(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a layer with the adapter of each row, or of the only trial."""
        if self.lone is None:
            return super().forward(layer, args, kwargs)
        recipes = layer._lora.recipes(self._whole) if isinstance(layer, LoRALinear) else ()
        if not any(recipe.dropout for recipe in recipes):
            return self._whole.forward(layer, args, kwargs)
        return self._alone(layer, self.lone, args, kwargs)

    def read(
        self, layer: Any, param: str, raw: Any, entries: Mapping[str, Any], *, outside: bool
    ) -> Any:
        """Return W + delta of the only trial; of several its values are those of none."""
        if self.lone is None:
            return super().read(layer, param, raw, entries, outside=outside)
        return self._whole.read(layer, param, raw, entries, outside=outside)

    def drops(self, layer: Any) -> bool:
        """Return whether dropout of adapters acts in a layer: in any mode of the base."""
        del layer
        return self.seeds is not None

    def alone(self, mix: Mix, n: int) -> Selected:
        """Return the pass of n rows of one trial by themselves; it drops the same elements."""
        (name,) = mix.names
        sizes, lengths = {name: n}, {name: self.of.lengths[name]}
        of = self.of._replace(sizes=sizes, lengths=lengths)
        return TrialRows(of, self.seeds, self.numbers, self.lengths)

    def place_of_rows(self, layer: Any, x: Tensor) -> tuple[int, int] | None:
        """Return the axis of an input that is the rows, and its length; None if it has none.

        A layer gets all positions of each row, or always as many, or always as many more. Experts
        that pick tokens by their values do not.
        """
        n, widths = len(self.rows), self.of.widths
        if self.packed:
            return super().place_of_rows(layer, x)
        if not x.dim() or not x.shape[0] or x.shape[0] % n:
            return None
        each = x.shape[0] // n
        first, before = self.lengths.setdefault(layer, (each, widths))
        both = zip(widths, before, strict=False)
        follows = each == first or any(each - now == first - then for now, then in both)
        return (0, x.shape[0]) if follows else None

    # ------------------------------------------------------------------------------------- dropout

    def dropped(
        self, layer: Any, x: Tensor, taking: Taking, adapters: list[list[Update]]
    ) -> tuple[Tensor, list[list[Update]]]:
        """Return the input of the adapters after the dropout of each trial."""
        p = {entry.adapter: entry.spec.dropout for entry in taking.entries if entry.spec}
        if self.seeds is not None and any(p.values()):
            axis = int(self.packed and x.shape[0] == 1)
            repeat = x.shape[axis] // len(self.rows)
            parts = torch.split(x, [n * repeat for n in self.of.sizes.values()], axis)
            named = zip(self.of.sizes, parts, strict=True)
            x = torch.cat([self._drop(layer, n, part, p.get(n, 0.0)) for n, part in named], axis)
        return x, [[u._replace(dropout=0.0) for u in updates] for updates in adapters]

    def _alone(self, layer: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a linear layer of one trial that has dropout."""
        recipes = layer._lora.choose(self._whole)  # notes the use
        x, float32 = layer._lora_input(args, kwargs), layer._lora.float32
        kept = self._drop(layer, name, x, max(recipe.dropout for recipe in recipes))
        updates = factors_of(recipes, held_by(layer), training=False)
        y = layer._lora_without_updates(args, kwargs)
        y = add_updates(y, kept, updates, float32=float32)
        entry = gained_entry(layer._lora, self._whole) if layer._lora.gains else None
        if entry is None:
            return y
        base = add_updates(layer._lora_without_updates((kept,), {}), kept, updates, float32=float32)
        bias = layer._lora_own("bias")
        base = base if bias is None else base - bias.to(base.dtype)
        return gained(y, base, gain_in_forward(layer, entry, recipes))

    def _drop(self, layer: Any, name: str, x: Tensor, p: float) -> Tensor:
        """Drop elements of one trial's rows, drawn for what is not padded."""
        if not p or self.seeds is None:
            return x
        seed = hash((self.seeds[name], self.numbers[layer])) % 2**63
        draw = torch.Generator(x.device).manual_seed(seed)
        rows = self.of.sizes[name] if not self.packed else 1
        each = x.reshape(rows, -1, x.shape[-1])
        own = self.of.lengths[name] if each.shape[1] == self.of.longest else each.shape[1]
        part = each if self.packed else each[:, :own]
        kept = torch.rand(part.shape, generator=draw, device=x.device, dtype=torch.float32) >= p
        dropped = part * kept.to(x.dtype) / (1 - p)
        return F.pad(dropped, (0, 0, 0, each.shape[1] - part.shape[1])).view(x.shape)
