"""The rows of one pass of several trials, as a way of taking part.

| a layer that | gives each trial's rows their own by |
|---|---|
| is a plain linear layer | products with views of the trials' memory, by ranges of tokens |
| adds to its output in another way | a bank, as under `routed` |
| convolves | one convolution with the trials as groups, as under `routed` |
| is a stack of experts | one call in which each pair of expert and trial is an expert |
| looks rows up, or reads its weights in another way | one run for the rows of each trial |
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.functional.factors import compute_dtype, needs_plain_operations
from lora_inject.core.layers.attached import held_by
from lora_inject.core.layers.linear_kinds import LoRALinear
from lora_inject.core.layers.selected import Mix
from lora_inject.rows.apart import apart, check_inputs
from lora_inject.rows.by_row import Rows, adds_to_output, check_rows
from lora_inject.rows.convolution import adds_rows
from lora_inject.rows.expert_rows import by_expert, places_of_runs, sorts_tokens
from lora_inject.rows.kept import adds_bias
from lora_inject.rows.routing import Routing
from lora_inject.rows.time_major import refuse_ambiguous
from lora_inject.trees import tree_leaves
from lora_inject.trials.passes import Pass
from lora_inject.trials.ranges import ranged_linear


class InPass(Rows):
    """The trial of each row of a pass.

    Args:
        one_pass: The tokens and the random numbers of each trial.
        rows: The trial of each row.
        single: Whether all rows are of one trial, so that weights are read with its adapter.
    """

    def __init__(self, one_pass: Pass, rows: Sequence[str | None], *, single: bool = False) -> None:
        super().__init__(rows)
        self.one_pass = one_pass
        self.single = single
        self._runs: dict[tuple[str | None, int], InPass] = {}

    def of_run(self, name: str | None, n: int) -> InPass:
        """Return the pass of n rows of one trial by themselves."""
        key = (name, n)
        if key not in self._runs:
            self._runs[key] = InPass(self.one_pass.only(name, n), (name,) * n, single=True)
        return self._runs[key]

    def drops(self, layer: Any) -> bool:  # noqa: ARG002 - in any mode of the base
        """Return whether dropout of adapters acts in a layer."""
        return self.one_pass.drops

    def splits(self) -> bool:
        """Return whether a weight that is read differs among the rows."""
        return not self.single

    def read(
        self, layer: Any, param: str, raw: Any, entries: Mapping[str, Any], *, outside: bool
    ) -> Any:
        """Return W + delta of the only trial; raise if there are several."""
        if self.single and (outside or not adds_bias(type(layer), param)):
            return Mix(self.names).read(layer, param, raw, entries, outside=outside)
        return super().read(layer, param, raw, entries, outside=outside)

    def check(self, layer: Any, x: Tensor) -> None:
        """Refuse an input that does not hold the tokens of each row, one after another."""
        n_rows = len(self.rows)
        if x.shape[0] % n_rows:
            check_rows(layer, x, n_rows, 1)
        self.one_pass.check(layer, x)
        refuse_ambiguous(layer, x, n_rows, 1)

    # ------------------------------------------------------------------------------------ layers

    def linear(self, layer: LoRALinear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a layer that adds to its output; of a packed batch as rows of tokens."""
        x = layer._lora_input(args, kwargs)
        if not self._packs(x):
            return super().linear(layer, args, kwargs)
        y = super().linear(layer, (x.flatten(0, 1),), {})
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def embedding(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look rows up, for each trial by itself: its dropout drops whole tokens."""
        ids = layer._lora_input(args, kwargs)
        packed = self._packs(ids)
        if not self.single:
            return apart(self, layer, (ids,), {}, dim=int(packed))
        if packed:
            rows = super().embedding(layer, (ids.flatten(0, 1),), {})
            return rows.reshape(*ids.shape, rows.shape[-1])
        return super().embedding(layer, (ids,), {})

    def reading(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer whose weights are read, for each trial by itself."""
        entries = self.entries_read(layer)
        if self.single or not entries:
            return layer._lora_mixed(self, args, kwargs)
        if adds_rows(layer._lora_plain, "weight") and all(map(adds_to_output, entries)):
            return super().reading(layer, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        sorts = sorts_tokens(layer)
        packed = bool(tensors) and self._packs(tensors[0])
        if sorts and not packed:
            y = self._by_expert(layer, args, kwargs)
            if y is not None:
                return y
        return apart(self, layer, args, kwargs, dim=int(packed), several=sorts)

    def _by_expert(
        self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Run a stack of experts once for the tokens of several trials, if it can be."""
        x = check_inputs(self, layer, tree_leaves((args, kwargs)), 0, several=True)
        repeat = x.shape[0] // len(self.rows)
        tokens = [(name, repeat * len(list(rows))) for name, rows in groupby(self.rows)]
        if len(tokens) < 2:
            return None
        names, sizes = zip(*tokens, strict=True)
        return by_expert(layer, names, places_of_runs(sizes, x.device), args, kwargs)

    def summed(
        self,
        layer: LoRALinear,
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        whole: bool,
    ) -> Tensor:
        """Return a layer's output with the update of each trial's own tokens."""
        if whole or not self.is_fused(layer) or needs_plain_operations():
            return super().summed(layer, x, args, kwargs, whole=whole)
        float32 = layer._lora.float32
        dtype = compute_dtype(_product_dtype(x), float32)
        kept, ranges, anchor, reached = self.one_pass.of_layer(layer, x, dtype)
        layer._lora_check_vain((anchor,))
        weight, bias = layer._lora_weight_and_bias()
        transposed = layer.transposed
        return ranged_linear(
            x, kept, weight, bias, ranges, anchor, reached, transposed=transposed, float32=float32
        )

    def dropped(self, layer: Any, x: Tensor, routing: Routing) -> tuple[Tensor, Any]:
        """Return the input after the dropout of each trial, and factors that drop no more."""
        adapters = routing.factors(held_by(layer), training=True)
        both = zip(routing.entries, adapters, strict=True)
        dropout = {entry.adapter: updates[0].dropout for entry, updates in both}
        x = self.one_pass.dropped(layer, x, dropout)
        return x, [[u._replace(dropout=0.0) for u in updates] for updates in adapters]

    def _packs(self, x: Tensor) -> bool:
        """Whether x is a packed batch `(1, tokens, ...)`, and the rows are those of its tokens."""
        if not self.one_pass.packed or x.dim() < 2:
            return False
        n = len(self.rows)
        return x.shape[0] != n and x.shape[1] == n


def runs_apart(module: Any) -> bool:
    """Whether a module can run for the rows of each trial by themselves, as far as is known now.

    Its forward takes one tensor, or the tensors of a stack of experts, which have its tokens first.
    """
    if sorts_tokens(module):
        return True
    needed = [
        p
        for p in inspect.signature(type(module)._lora_plain.forward).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    stacked = any(e.spec is not None and e.spec.experts for e in module._lora.entries())
    return len(needed) == 2 and not stacked and not isinstance(module, nn.RNNBase)


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a plain layer multiplies x."""
    kind = x.device.type
    lowers = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if lowers else x.dtype
