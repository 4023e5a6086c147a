"""An adapter for each row of a batch, as a way of taking part.

| a layer that | gives each row its own by |
|---|---|
| adds to its output (linear) | products with a bank of the adapters, gathered by row |
| looks rows up (embedding) | a lookup for each adapter |
| convolves | one convolution with the adapters as groups |
| is a stack of experts | one call in which each pair of expert and adapter is an expert |
| has trained copies, and treats rows alike | one run for each run of rows of one adapter |
| reads one weight for the whole batch | an error |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_inject.core.functional.factors import cast
from lora_inject.core.functional.gain import gained
from lora_inject.core.functional.lazy import lazy_weight
from lora_inject.core.layers.attached import Entry, attached_to, held_by
from lora_inject.core.layers.effective import trained
from lora_inject.core.layers.embedding_kind import LoRAEmbedding
from lora_inject.core.layers.gains import gain_in_forward
from lora_inject.core.layers.linear_kinds import LoRALinear
from lora_inject.core.layers.plain_tensors import PLAIN
from lora_inject.core.layers.selected import Mix, Selected
from lora_inject.core.layers.sending import queue_of
from lora_inject.errors import LayerError
from lora_inject.rows.apart import apart, check_inputs
from lora_inject.rows.bank import routed_embedding, routed_update
from lora_inject.rows.convolution import adds_rows, convolved
from lora_inject.rows.expert_rows import by_expert, check_tokens, sorts_tokens
from lora_inject.rows.kept import adds_bias, is_rowwise
from lora_inject.rows.routing import NOTHING, Places, Routing, places_of, routing
from lora_inject.rows.time_major import refuse_ambiguous
from lora_inject.trees import tree_leaves


class Rows(Selected):
    """The adapter of each row, None for the base.

    Args:
        rows: The adapters.
        repeat: How many consecutive rows of an input share one of them (beams).
    """

    asked = "routed()"

    def __init__(self, rows: Sequence[str | None], repeat: int = 1) -> None:
        self.rows = tuple(rows)
        self.repeat = repeat
        self.names: Mapping[str, float] = {name: 1.0 for name in self.rows if name is not None}
        self._places: dict[Any, Places] = {}
        self._routings: dict[Any, Routing] = {}
        self._mixes: dict[str | None, Mix] = {}

    # ------------------------------------------------------------------------------------ seams

    def forward(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a layer with the adapter of each row."""
        if isinstance(layer, LoRALinear):
            return self.linear(layer, args, kwargs)
        if isinstance(layer, LoRAEmbedding):
            return self.embedding(layer, args, kwargs)
        return self.reading(layer, args, kwargs)

    def read(
        self, layer: Any, param: str, raw: Any, entries: Mapping[str, Any], *, outside: bool
    ) -> Any:
        """Return W if its shape or dtype is read; raise if its values are used."""
        if adds_bias(type(layer), param) and not outside:
            return raw  # the layer's own forward, which adds to each row's output
        if not self.names.keys() & entries.keys():
            return raw

        def used() -> None:
            raise LayerError(
                f"{self.asked}, reading {param!r} of a {type(layer).__name__}",
                "one weight is read for the whole batch, and its rows have adapters of their own",
                "Leave this layer out of adapters that are routed",
            )

        return lazy_weight(raw, (), float32=False, used=used, any_shape=True)

    def of_run(self, name: str | None, n: int) -> Selected:  # noqa: ARG002 - a pass needs it
        """Return who takes part in n rows of one adapter by themselves."""
        if name not in self._mixes:
            self._mixes[name] = Mix({} if name is None else {name: 1.0})
        return self._mixes[name]

    def forget_use(self) -> None:
        """Let the next forward of each layer note again which entries it uses."""
        self._routings.clear()

    # ----------------------------------------------------------------------------------- layers

    def linear(self, layer: LoRALinear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a layer that adds to its output: the update of each row, its gain, its bias."""
        x = layer._lora_input(args, kwargs)
        if x.is_nested:
            problem = f"a {type(layer).__name__} got a nested tensor"
            raise LayerError(self.asked, problem, "Pad the batch, or run each adapter's rows alone")
        reads = layer._lora.reads
        whole = self._reads_whole(layer) if reads else False
        if whole and self.splits():
            return apart(self, layer, args, kwargs)
        y = self.summed(layer, x, args, kwargs, whole=whole)
        biases = self._biases(layer, x) if reads and adds_bias(type(layer), "bias") else None
        if layer._lora.gains:
            y = self._gained(layer, y, x)
        return y if biases is None else y + cast(biases, y.dtype)

    def embedding(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look rows up with the update, and the gain, of each row's own adapter."""
        ids = layer._lora_input(args, kwargs)
        routing = self.routing(layer, layer._lora.forward, ids)
        weight = layer._lora_own("weight")
        if not routing.entries:
            return layer._lora_rows(ids, weight, layer.max_norm)
        adapters = routing.factors(held_by(layer), training=layer.training)
        rows = routed_embedding(
            layer._lora_rows(ids, weight, None),
            ids,
            routing.places.rows,
            adapters,
            layer.padding_idx,
            float32=layer._lora.float32,
        )
        gain = self._gains(layer, routing, rows.dim()) if layer._lora.gains else None
        return layer._lora_finished(rows, ids, gain)

    def reading(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer whose weights are read: its rows by themselves where that can be."""
        entries = self.entries_read(layer)
        plain = layer._lora_plain
        if adds_rows(plain, "weight") and all(map(adds_to_output, entries)):
            return convolved(self, layer, args[0] if args else kwargs["input"])
        if entries and is_rowwise(plain) and all(entry.spec is None for entry in entries):
            return apart(self, layer, args, kwargs)
        if entries and sorts_tokens(layer):
            return self._experts(layer, args, kwargs)
        return layer._lora_mixed(self, args, kwargs)  # reading a weight says what cannot be

    def _experts(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a stack of experts for the tokens of all rows, row after row."""
        if torch.compiler.is_compiling():  # dynamo cannot raise our exception: it shows the text
            raise RuntimeError("A stack of experts cannot be routed in a graph.")
        x = check_inputs(self, layer, tree_leaves((args, kwargs)), 0, several=True)
        names = list(self.names)
        places = places_of(self.rows, names, x.shape[0] // len(self.rows), x.device)
        y = by_expert(layer, (None, *names), places.rows, args, kwargs)
        return apart(self, layer, args, kwargs, several=True) if y is None else y

    def entries_read(self, layer: Any) -> list[Entry]:
        """Return the entries of the rows' adapters on parameters that a layer reads."""
        tables = layer._lora.reads.values()
        return [table[name] for table in tables for name in self.names if name in table]

    def splits(self) -> bool:
        """Return whether a weight that is read differs among the rows."""
        return True

    def summed(
        self,
        layer: LoRALinear,
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        whole: bool,
    ) -> Tensor:
        """Return a layer's output with the update of each row's own adapter."""
        routing = self.routing(layer, layer._lora.forward, x)
        y: Tensor = layer._lora_without_updates(args, kwargs)
        if not routing.entries:
            return y
        x, adapters = self.dropped(layer, x, routing)
        return routed_update(
            y,
            x,
            routing.places.blocks,
            adapters,
            float32=layer._lora.float32,
            in_place=self.is_fused(layer) and not whole,
            in_order=routing.places.in_order,
        )

    def dropped(self, layer: Any, x: Tensor, routing: Routing) -> tuple[Tensor, Any]:
        """Return the input of the adapters, and their factors with what is yet to be dropped."""
        return x, routing.factors(held_by(layer), training=layer.training)

    def is_fused(self, layer: LoRALinear) -> bool:
        """Return whether a layer's output is ours alone, as that of a plain stock layer is."""
        return layer._lora_stock and type(layer._parameters.get("weight")) in PLAIN

    # ---------------------------------------------------------------------------------- routing

    def routing(self, layer: Any, by_adapter: Mapping[str, Entry], x: Tensor) -> Routing:
        """Return which adapter each row of a layer's input, rows first, has.

        Raises:
            LayerError: The input has another number of rows.
        """
        self.check(layer, x)
        attached = attached_to(layer)
        assert attached is not None
        key = (attached, id(by_adapter), x.shape[0], queue_of(x.device))
        known = self._routings.get(key)
        if known is None:
            entries = [by_adapter[name] for name in self.names if name in by_adapter]
            known = routing(entries, self._places_of(entries, x)) if entries else NOTHING
            self._routings[key] = known
            attached.used(entries)
        layer._lora_check_vain(t for entry in known.entries for t in entry.tensors(layer).values())
        return known

    def _places_of(self, entries: Sequence[Entry], x: Tensor) -> Places:
        adapters = tuple(entry.adapter for entry in entries)
        key = (adapters, x.shape[0], queue_of(x.device))
        if key not in self._places:
            repeat = x.shape[0] // len(self.rows)
            self._places[key] = places_of(self.rows, adapters, repeat, x.device)
        return self._places[key]

    def check(self, layer: Any, x: Tensor) -> None:
        """Refuse an input whose first dimension is not the rows, or may not be.

        Raises:
            LayerError: It has another length, or time may come before the batch.
        """
        if sorts_tokens(layer):
            check_tokens(layer, x, len(self.rows))
        else:
            check_rows(layer, x, len(self.rows), self.repeat)

    # --------------------------------------------------------------------------- gains and biases

    def _reads_whole(self, layer: LoRALinear) -> bool:
        """Whether an adapter of the rows has a trained copy that its layer reads as a whole."""
        added = "bias" if adds_bias(type(layer), "bias") else None
        reads = layer._lora.reads
        tables = [table for param, table in reads.items() if param != added]
        return any(name in self.names for table in tables for name in table)

    def _biases(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        """Return what to add to the bias for each row `(batch, 1, ..., out)`, None for nothing."""
        by_adapter = layer._lora.reads.get("bias")
        if not by_adapter:
            return None
        routing = self.routing(layer, by_adapter, x)
        if not routing.entries:
            return None
        held, raw = held_by(layer), layer._lora_raw("bias")
        each = [trained(entry, raw, raw, held[entry.mark], 1.0) - raw for entry in routing.entries]
        biases = torch.stack([torch.zeros_like(raw), *each]).index_select(0, routing.places.rows)
        return biases.view(-1, *[1] * (x.dim() - 2), biases.shape[-1])

    def _gained(self, layer: LoRALinear, y: Tensor, x: Tensor) -> Tensor:
        """Multiply each row's output by the gain of its own adapter."""
        routing = self.routing(layer, layer._lora.forward, x)
        gains = self._gains(layer, routing, y.dim())
        if gains is None:
            return y
        specs = [entry.spec for entry in routing.entries if entry.gained]
        if self.drops(layer) and any(spec is not None and spec.dropout for spec in specs):
            raise LayerError(
                f"{self.asked} in training",
                f"a {type(layer).__name__} has an adapter with a gain and dropout",
                "Give it dropout: 0, or train it alone",
            )
        bias = layer._lora_own("bias")
        return gained(y, y if bias is None else y - bias.to(y.dtype), gains)

    def _gains(self, layer: Any, routing: Routing, n_dims: int) -> Tensor | None:
        """Return the gains of each row, `(batch, 1, ..., out)`; None where all are 1."""
        gains = {
            i: gain_in_forward(layer, entry, recipes)
            for i, (entry, recipes) in enumerate(zip(routing.entries, routing.recipes, strict=True))
            if entry.gained
        }
        if not gains:
            return None
        ones = torch.ones_like(next(iter(gains.values())))
        each = [ones, *(gains.get(i, ones) for i in range(len(routing.entries)))]
        of_rows = torch.stack(each).index_select(0, routing.places.rows)
        return of_rows.view(-1, *[1] * (n_dims - 2), of_rows.shape[-1])


def adds_to_output(entry: Entry) -> bool:
    """Whether an update can be added to the output of a convolution."""
    return entry.spec is not None and not entry.gained


def check_rows(layer: Any, x: Tensor, n_rows: int, repeat: int) -> None:
    """Refuse an input of a layer whose first dimension is not that of `n_rows` rows.

    Raises:
        LayerError: It has another length, or time may come before the batch.
    """
    if x.shape[0] not in (n_rows, n_rows * repeat):
        multiple = f", nor {repeat} times that" if repeat > 1 else ""
        raise LayerError(
            f"routed() with {n_rows} rows",
            f"a {type(layer).__name__} got an input of shape {tuple(x.shape)}, whose first "
            f"dimension is not the number of rows{multiple}",
            "Give one adapter for each row of the batch; for beams use repeat=n, for sequences "
            "that are packed into one row tokens=[...], the length of each",
        )
    refuse_ambiguous(layer, x, n_rows, repeat)
