"""Who takes part in a compiled graph, in a form that switches without compiling again.

A graph guards on what Python code of ours it has read. So who is selected gets a second form, which
a graph reads in its place (`Selected.in_graph`): a tensor names the adapters, and a graph holds all
that it may choose among.

| in a graph | names are |
|---|---|
| a layer with one adapter, with gains, or with different dropouts | constants |
| adapters that train, where gradients are asked for | constants: a graph cannot leave one out |
| all other adapters of a layer | data |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lora_inject.core.functional.factors import Update, compute_dtype
from lora_inject.core.functional.plain_operations import add_updates, embedding
from lora_inject.core.functional.torch_inside import constant_in_graphs
from lora_inject.core.layers.adapted import Adapted
from lora_inject.core.layers.attached import Recipe, factors_of, held_by
from lora_inject.core.layers.kinds import LoRAEmbedding, LoRALinear
from lora_inject.core.layers.selection import SELECTIONS, Mix, Selected, alive
from lora_inject.core.layers.sending import sent
from lora_inject.rows.bank import bank_of, routed_update, stacked
from lora_inject.rows.by_row import Rows
from lora_inject.rows.seen import Routed, refuse_ambiguous

# dynamo before 2.9 cannot follow the search for the adapter that has the gain.
GRAPHS_HAVE_GAINS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
_BY_DATA = (LoRALinear, LoRAEmbedding)  # a tuple: dynamo before 2.9 cannot read a union


class Choice:
    """Numbers and weights of the chosen adapters, on devices.

    Attributes:
        on: `(n, 2)` on each device: of each active adapter, or of each row's (-1 for the base), its
            number and its weight.
    """

    def __init__(self, pairs: Sequence[tuple[int, float]], devices: Iterable[torch.device]) -> None:
        self.on = {device: _as_tensor(pairs, device) for device in devices}

    def at(self, device: torch.device) -> Tensor:
        """Return the choice on a device."""
        there = self.on.get(device)
        return next(iter(self.on.values())).to(device) if there is None else there


class ChosenMix(Mix):
    """A mix whose names are data, where a layer can choose by data."""

    def __init__(self, mix: Mix, devices: Iterable[torch.device]) -> None:
        super().__init__(mix.names)
        self.choice = Choice([(number_of(n), w) for n, w in mix.names.items()], devices)

    def forward(self, layer: Adapted, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a layer with what the tensor chooses."""
        # The tensor tells how many are chosen; a look at the names would make them constants.
        if not isinstance(layer, _BY_DATA):
            return layer._lora_mixed(self, args, kwargs)
        attached = layer._lora
        if len(attached.forward) < 2 or attached.gains:
            return self._by_names(layer, args, kwargs)
        y = layer._lora_without_updates(args, kwargs)
        choice = self.choice.at(y.device)
        numbers, adapters = eligible(layer, self.names)
        if not adapters or not choice.shape[0]:
            return y
        dropouts = {r.dropout if layer.training else 0.0 for rs in adapters for r in rs}
        if len(dropouts) > 1:
            return self._by_names(layer, args, kwargs)
        dtype, held = compute_dtype(y.dtype, attached.float32), held_by(layer)
        A, B, scale = chosen_factors(choice, numbers, adapters, held, y.size(-1), dtype)
        chosen = Update(A, B, scale, dropout=adapters[0][0].dropout if layer.training else 0.0)
        if isinstance(layer, LoRAEmbedding):
            return layer._lora_with_updates(args, kwargs, [chosen])
        x = layer._lora_input(args, kwargs)
        return add_updates(y, x, [chosen], float32=attached.float32)

    def _by_names(self, layer: Adapted, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if layer._lora.gains and not GRAPHS_HAVE_GAINS and torch.compiler.is_compiling():
            fullgraph_of_an_adapter_with_a_gain_as_dora_needs_torch_2_9()
        return layer._lora_mixed(self, args, kwargs)


class ChosenRows(Rows):
    """Rows whose adapters are data, where a layer can choose by data.

    Args:
        rows: The rows, which compute all else, outside of the graph.
        devices: Where adapters are.
    """

    def __init__(self, rows: Rows, devices: Iterable[torch.device]) -> None:
        super().__init__([dict(row) for row in rows.rows], rows.repeat)
        self.of, self.asked = rows, rows.asked
        self.are_data = isinstance(rows, Routed) and not rows.are_mixed
        if self.are_data:
            pairs = [(number_of(row[0][0]), 1.0) if row else (-1, 1.0) for row in rows.rows]
            self.choice = Choice(pairs, devices)

    def forward(self, layer: Adapted, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a layer with the adapter of each row."""
        attached = layer._lora
        apart = not self.are_data or attached.reads or attached.gains
        if apart or not isinstance(layer, _BY_DATA):
            return fullgraph_cannot_route_mixes_nor_a_layer_that_runs_for_each_adapter(
                self.of, layer, args, kwargs
            )
        x = layer._lora_input(args, kwargs)
        choice = self.choice.at(x.device)
        n = choice.shape[0]
        if attached.no_rows or x.shape[0] not in (n, n * self.repeat):
            raise self.misfit(layer, x)
        refuse_ambiguous(layer, x, n, self.repeat)
        numbers, adapters = eligible(layer, self.names)
        if not adapters:
            return layer._lora_without_updates(args, kwargs)
        rows = chosen_rows(choice[:, 0], numbers)
        rows = rows.repeat_interleave(x.shape[0] // n)
        out = base = layer._lora_without_updates(args, kwargs)
        if isinstance(layer, LoRALinear):
            bank, held = bank_of([[], *adapters]), held_by(layer)
            float32, drops = attached.float32, layer.training
            return routed_update(base, x, bank, held, rows, float32=float32, drops=drops)
        for place, recipes in enumerate(adapters, 1):
            updates = factors_of(recipes, held_by(layer), training=layer.training)
            own = embedding(base, x, updates, layer.padding_idx, float32=attached.float32)
            out = torch.where((rows == place).view(-1, *[1] * (base.dim() - 1)), own, out)
        return out


@torch.compiler.disable  # type: ignore[untyped-decorator] # a graph cannot hold it
def fullgraph_of_an_adapter_with_a_gain_as_dora_needs_torch_2_9() -> None:
    """Break the graph: dynamo before 2.9 shows a function's name, and no text of ours."""


@torch.compiler.disable  # type: ignore[untyped-decorator] # it enters contexts, as no graph does
def fullgraph_cannot_route_mixes_nor_a_layer_that_runs_for_each_adapter(
    rows: Rows, layer: Adapted, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Compute a layer outside of the graph; dynamo shows this name under `fullgraph=True`."""
    return rows.forward(layer, args, kwargs)


def eligible(layer: Adapted, names: Mapping[str, float]) -> tuple[list[int], list[list[Recipe]]]:
    """Return the numbers of the adapters among which a compiled graph chooses, and their updates.

    Those that train must be constants of a graph where gradients are asked for: it cannot leave one
    out, and a gradient of zeros would let weight decay move an adapter that takes no part.
    """
    held, grad = held_by(layer), torch.is_grad_enabled()
    numbers, adapters = [], []
    for name, entry in layer._lora.forward.items():
        trains = any(held[flat].requires_grad for flat in entry.names.values())
        if not (grad and trains) or name in names:
            numbers.append(number_of(name))
            adapters.append([*entry.recipes(1.0)])
    return numbers, adapters


# -------------------------------------------------------------------------------------- following


def follow_all() -> None:
    """Let every selection be followed into graphs from now on."""
    for selection in alive(SELECTIONS):
        if selection.into_graphs is None:
            selection.into_graphs = into_graph
            selection.follow(selection.setting)
            for context in tuple(selection.contexts):
                selection.follow(context.selected[selection])


def into_graph(selected: Selected, devices: Iterable[torch.device]) -> None:
    """Give a `Selected` the form that graphs read."""
    if isinstance(selected, Mix):
        selected.in_graph = ChosenMix(selected, devices)
    elif isinstance(selected, Rows):
        selected.in_graph = ChosenRows(selected, devices)
    else:
        selected.in_graph = selected


def _as_tensor(pairs: Sequence[tuple[int, float]], device: torch.device) -> Tensor:
    """Return `(n, 2)`; a fake tensor, of the mode that the caller is in, would outlive the mode."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    with _disable_current_modes():
        return sent(pairs, device, dtype).view(-1, 2)


_NUMBERS: dict[str, int] = {}


@constant_in_graphs
def number_of(adapter: str) -> int:
    """Return the number that stands for an adapter's name in tensors, in this process."""
    return _NUMBERS.setdefault(adapter, len(_NUMBERS))


def chosen_factors(
    choice: Tensor,
    numbers: Sequence[int],
    adapters: Sequence[Sequence[Recipe]],
    held: Mapping[str, Tensor],
    out: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, float]:
    """Return A, B and scale of one update that equals those of the adapters that a tensor names.

    `choice` is `(k, 2)`, float64: number and weight of each chosen adapter; `numbers` are those of
    this layer's adapters. Adapters that are not chosen do not reach the output, not even where they
    hold NaN; where they require a gradient, it is zero.
    """
    bank = bank_of(adapters)
    A_bank, B_T_bank = stacked(bank, held, out, dtype)
    rows = chosen_rows(choice[:, 0], numbers)
    index, here = (rows - 1).clamp(min=0), (rows > 0)[:, None, None]
    weights = choice[:, 1].to(dtype)[:, None, None]
    A = torch.where(here, A_bank.index_select(0, index), 0)
    B_T = torch.where(here, B_T_bank.index_select(0, index) * weights, 0)
    return A.flatten(0, 1), B_T.flatten(0, 1).t(), bank.scale


def chosen_rows(chosen: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return `(k,)`, int64: 1 + the place of each chosen number among `numbers`, 0 for strangers.

    Examples:
        >>> chosen_rows(torch.tensor([5.0, -1.0, 4.0]), [4, 5]).tolist()
        [2, 0, 1]
    """
    # Compared with numbers of Python: a tensor of them would be copied to the device each time.
    rows = torch.zeros_like(chosen, dtype=torch.int64)
    for place, number in enumerate(numbers, 1):
        rows = torch.where(chosen == number, place, rows)
    return rows
