"""An adapter for each row of a batch, as a way of taking part.

A linear layer whose adapters only add to its output gets them by row, from a bank. Any other layer
runs once for each adapter, on the rows of that adapter. That a layer's first axis is the rows is
seen by whoever gives the batch: `rows.seen`, `trials.shared`. Both do it with marks in the place of
adapters, as new ones add nothing yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lora_inject.core.functional.lazy import lazy_weight
from lora_inject.core.layers.adapted import Adapted
from lora_inject.core.layers.attached import Attached, Entry, Recipe, held_by
from lora_inject.core.layers.kinds import LoRALinear
from lora_inject.core.layers.selection import Mix, Selected, in_context
from lora_inject.core.layers.sending import queue_of, sent
from lora_inject.errors import LayerError
from lora_inject.rows.bank import Bank, bank_of, routed_update

Row = tuple[tuple[str, float], ...]
"""What takes part in a row: adapters with their weights; none for the base."""

_BASE = Mix()

_FEW = 32
"""Up to so many rows, to put the tensors of each together costs less than to pick from a stack."""


def row_of(which: str | Mapping[str, float] | None) -> Row:
    """Return a row in one form.

    Examples:
        >>> row_of("sql"), row_of(None), row_of({"sql": 0.5, "style": 2})
        ((('sql', 1.0),), (), (('sql', 0.5), ('style', 2.0)))
    """
    if which is None:
        return ()
    if isinstance(which, str):
        return ((which, 1.0),)
    return tuple((name, float(weight)) for name, weight in which.items())


class Taking(NamedTuple):
    """What the rows of a batch have of one layer.

    Attributes:
        entries: All of it.
        bank: The updates, if they are all, and are added to the output of each row.
        places: The place of each row in the bank. Fewer stand for as many equal runs of rows; None
            for one run of each place, in order.
        by_row: A bank with a place for each of a few such runs, of which nothing is picked. A
            backward would have to add what each place of one adapter gives, one by one.
    """

    entries: Sequence[Entry]
    bank: Bank | None = None
    places: tuple[int, ...] | None = None
    by_row: Bank | None = None


class Rows(Selected):
    """The adapter of each row, None for the base, or a mix of adapters.

    Args:
        rows: The adapters.
        repeat: How many consecutive rows of an input share one of them (beams).
    """

    asked = "routed()"

    def __init__(self, rows: Sequence[str | Mapping[str, float] | None], repeat: int = 1) -> None:
        self.rows, self.repeat = tuple(map(row_of, rows)), repeat
        self.names = dict.fromkeys((name for row in self.rows for name, _ in row), 1.0)
        self.mixes = {row: Mix(dict(row)) for row in dict.fromkeys(self.rows)}
        self._taking: dict[Any, Taking] = {}
        self._places: dict[Any, Tensor] = {}
        self._index: dict[Any, tuple[list[tuple[Mix, Tensor]], Tensor]] = {}

    @property
    def are_mixed(self) -> bool:
        """Whether a row has a mix, rather than one adapter or none."""
        return any(len(row) > 1 or row[0][1] != 1.0 for row in self.mixes if row)

    # ------------------------------------------------------------------------------------ seams

    def forward(self, layer: Adapted, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a layer with the adapter of each row."""
        taking = self.taking(layer)
        if not taking.entries:
            return layer._lora_mixed(_BASE, args, kwargs)
        if layer.training:
            held = (entry.tensors(layer) for entry in taking.entries)
            layer._lora_check_vain(t for tensors in held for t in tensors.values())
        if isinstance(layer, LoRALinear) and taking.bank is not None:
            return self.banked(layer, taking, taking.bank, args, kwargs)
        return self.apart(layer, args, kwargs)

    def read(
        self, layer: Adapted, param: str, raw: Any, entries: Mapping[str, Entry], *, outside: bool
    ) -> Any:
        """Return W if its shape or dtype is read; its values are not those of any row."""
        del outside
        if not self.names.keys() & entries.keys():
            return raw

        def used() -> None:
            problem = "one weight is read for the whole batch, and its rows have their own"
            asked = f"{self.asked}, reading {param!r} of a {type(layer).__name__}"
            remedy = "Leave this layer out of adapters that are routed"
            self.cannot(layer, LayerError(asked, problem, remedy))

        return lazy_weight(raw, (), used=used)

    def forget_use(self) -> None:
        """Let the next forward of each layer note again which entries it uses."""
        self._taking.clear()

    # ------------------------------------------------------------------------------- what and who

    def taking(self, layer: Adapted) -> Taking:
        """Return what the rows have of a layer, and note its use."""
        attached = layer._lora
        known = self._taking.get(attached)
        if known is None:
            entries = [e for e in attached.entries() if e.adapter in self.names]
            attached.used(entries)
            each = {row: recipes for row in self.mixes if (recipes := _recipes(attached, row))}
            adds = all(entry.on_output and not entry.gained for entry in entries)
            adds = adds and all(len({r.dropout for r in recipes}) == 1 for recipes in each.values())
            known = self._banked(entries, each) if adds and each else Taking(entries)
            self._taking[attached] = known
        return known

    def _banked(self, entries: Sequence[Entry], each: Mapping[Row, Sequence[Recipe]]) -> Taking:
        """Return what the rows have of a layer that takes it from a bank."""
        kinds = [*each.values()]
        if len(each) < len(self.mixes):
            kinds.insert(0, ())  # the base
        place = {row: i for i, row in enumerate(each, len(kinds) - len(each))}
        places = [place.get(row, 0) for row in self.rows]
        runs = (len(list(same)) for _, same in groupby(places))
        places = places[:: math.gcd(*runs)]
        bank = bank_of(kinds)
        if places == [*range(len(kinds))]:
            return Taking(entries, bank)
        few = len(places) <= _FEW and bank.even and not bank.changed
        by_row = bank_of([kinds[place] for place in places]) if few else None
        return Taking(entries, bank, (*places,), by_row)

    def number_of_rows(self, layer: Adapted, x: Tensor) -> int | None:
        """Return how long the first axis of an input is; None if that is not the rows."""
        del layer
        n, length = len(self.rows), x.shape[0] if x.dim() else 0
        return length if length in (n, n * self.repeat) else None

    def rows_first(self, layer: Adapted, x: Tensor) -> int | None:
        """Return the same of an input whose rows can be told; None if the batch must run apart.

        Raises:
            LayerError: It must, and nobody can run it again.
        """
        count = self.number_of_rows(layer, x)
        if count is None:
            self.cannot(layer, self.misfit(layer, x))
            return None
        return count if self.sees_rows(layer, x) else None

    def sees_rows(self, layer: Adapted, x: Tensor) -> bool:
        """Note that a layer takes the first axis for the rows; return False if it never is."""
        del layer, x
        return True

    def cannot(self, layer: Adapted, problem: LayerError) -> None:
        """Note that the rows of a layer cannot be told, or raise."""
        del layer
        raise problem

    def misfit(self, layer: Adapted, *values: Any) -> LayerError:
        """Return what to say of what a layer gets or returns, where the rows cannot be told."""
        multiple = f", nor {self.repeat} times that" if self.repeat > 1 else ""
        shown = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in values]
        return LayerError(
            f"{self.asked} with {len(self.rows):,} rows",
            f"a {type(layer).__name__} got an input of shape {', '.join(map(str, shown))}, whose "
            f"first dimension is not the number of rows{multiple}",
            "Give one adapter for each row of the batch; for beams use repeat=n",
        )

    # ------------------------------------------------------------------------------------ two ways

    def banked(
        self,
        layer: LoRALinear,
        taking: Taking,
        bank: Bank,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Add to each row of a layer's output the update of its own adapter."""
        x = layer._lora_input(args, kwargs)
        if x.is_nested:
            problem = f"a {type(layer).__name__} got a nested tensor"
            raise LayerError(self.asked, problem, "Pad the batch, or run each adapter's rows alone")
        if self.rows_first(layer, x) is None:
            plain: Tensor = layer._lora_without_updates(args, kwargs)
            return plain
        x, drops = self.dropped(layer, x, taking)
        y: Tensor = layer._lora_without_updates(args, kwargs)
        places, float32, held = None, layer._lora.float32, held_by(layer)
        if taking.by_row is not None and not torch.is_grad_enabled():
            bank = taking.by_row
        elif taking.places is not None:
            places = self._sent(taking.places, x.device)
        return routed_update(y, x, bank, held, places, float32=float32, drops=drops)

    def dropped(self, layer: Adapted, x: Tensor, taking: Taking) -> tuple[Tensor, bool]:
        """Return the input of the adapters, and whether it is yet to be dropped."""
        del taking
        return x, self.drops(layer)

    def apart(self, layer: Adapted, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer once for each adapter, on the rows of that adapter."""
        given, form = tree_flatten((args, kwargs))
        tensors = [t for t in given if isinstance(t, Tensor)]
        counts = {self.number_of_rows(layer, t) for t in tensors}
        if len(counts) != 1 or None in counts:
            wrong = [t for t in tensors if self.number_of_rows(layer, t) is None]
            self.cannot(layer, self.misfit(layer, *(wrong or given)))
            return self.run(layer, _BASE, args, kwargs)
        if (count := self.rows_first(layer, tensors[0])) is None:
            return self.run(layer, _BASE, args, kwargs)
        outputs, form_out = [], form
        each, order = self.index(count, tensors[0].device)
        for mix, index in each:
            part = [t.index_select(0, index) if isinstance(t, Tensor) else t for t in given]
            run_args, run_kwargs = tree_unflatten(part, form)
            try:
                out = self.run(layer, self.alone(mix, len(index)), run_args, run_kwargs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # of shapes: what the layer takes has no rows
                out = ()
            leaves, form_out = tree_flatten(out)
            split = [_by_row(t, len(index)) for t in leaves]
            mixed = any(
                t is None and leaf is not None for t, leaf in zip(split, leaves, strict=True)
            )
            if mixed or not leaves:
                self.cannot(layer, self.misfit(layer, *(leaves or given)))
                return self.run(layer, _BASE, args, kwargs)
            outputs.append(split)
        whole = [
            None if column[0] is None
            else torch.cat(column).index_select(0, order).flatten(0, 1)
            for column in zip(*outputs, strict=True)
        ]  # fmt: skip
        return tree_unflatten(whole, form_out)

    def run(
        self, layer: Adapted, selected: Selected, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a layer with others taking part."""
        with in_context({layer._lora.selection: selected}):
            return selected.forward(layer, args, kwargs)

    def alone(self, mix: Mix, n: int) -> Selected:
        """Return who takes part in n rows that have one mix."""
        del n
        return mix

    # --------------------------------------------------------------------------- where the rows are

    def _sent(self, places: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the places of rows on a device."""
        key = places, queue_of(device)
        if key not in self._places:
            self._places[key] = sent(places, device)
        return self._places[key]

    def index(self, count: int, device: torch.device) -> tuple[list[tuple[Mix, Tensor]], Tensor]:
        """Return where the rows of each mix are, and where each is when these stand in turn."""
        key = count, queue_of(device)
        if key not in self._index:
            each: dict[Row, list[int]] = {row: [] for row in self.mixes}
            for i in range(count):
                each[self.rows[i * len(self.rows) // count]].append(i)
            places = [i for mine in each.values() for i in mine]
            order = sorted(range(count), key=places.__getitem__)
            sent_each = [(self.mixes[row], sent(mine, device)) for row, mine in each.items()]
            self._index[key] = sent_each, sent(order, device)
        return self._index[key]


def _recipes(attached: Attached, row: Row) -> list[Recipe]:
    """Return the updates that a row has on the output of a layer."""
    held = attached.forward
    return [recipe for name, w in row if name in held for recipe in held[name].recipes(w)]


def _by_row(t: Any, n: int) -> Tensor | None:
    """Return an output by its n rows, and what each has; None if it has no rows."""
    if not isinstance(t, Tensor) or not t.dim() or t.shape[0] % n:
        return None
    return torch.unflatten(t, 0, (n, -1))


class Marked(Selected):
    """Rows, or all rows as one of them, that have marks in the place of adapters.

    Args:
        rows: Who takes part.
        only: The only row.
    """

    def __init__(self, rows: Rows, only: Row | None = None) -> None:
        self.rows, self.names = rows, rows.names
        numbers = {row: number for number, row in enumerate(rows.mixes, 1)}
        self.marks = [numbers[row] for row in (rows.rows if only is None else (only,))]

    def forward(self, layer: Adapted, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a layer without adapters, and mark what it gives for each row."""
        made = layer._lora_mixed(Mix(), args, kwargs)
        if not self.rows.taking(layer).entries:
            return made
        first = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        if len(self.marks) > 1 and self.rows.rows_first(layer, first) is None:
            return made
        return tree_map(self._marked, made)

    def read(
        self, layer: Adapted, param: str, raw: Any, entries: Mapping[str, Entry], *, outside: bool
    ) -> Any:
        """Return the plain parameter."""
        del layer, param, entries, outside
        return raw

    def _marked(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or not leaf.is_floating_point():
            return leaf
        axis = torch.arange(1, leaf.shape[-1] + 1 if leaf.dim() > 1 else 2, device=leaf.device)
        each = torch.tensor(self.marks, device=leaf.device)
        marks = 1 + 0.5 * torch.outer(each, axis).sin().to(leaf.dtype)
        split = torch.unflatten(leaf, 0, (len(self.marks), -1))
        return (split * marks.view(len(marks), *[1] * (split.dim() - 2), -1)).flatten(0, 1)
