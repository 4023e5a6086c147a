"""An adapter for each range of tokens of a batch in which sequences are packed into one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_inject.core.layers.linear_kinds import LoRALinear
from lora_inject.errors import LayerError
from lora_inject.rows.apart import apart
from lora_inject.rows.by_row import Rows
from lora_inject.rows.kept import is_rowwise
from lora_inject.rows.time_major import refuse_ambiguous


class TokenRanges(Rows):
    """The adapter of each token: layers take `(1, tokens, ...)`, or `(tokens, ...)`.

    Args:
        adapters: The adapter of each range, None for the base.
        tokens: How many tokens each range has.
    """

    asked = "routed() with tokens"

    def __init__(self, adapters: Sequence[str | None], tokens: Sequence[int]) -> None:
        ranges = zip(adapters, tokens, strict=True)
        super().__init__([name for name, n in ranges for _ in range(n)])

    def forward(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a layer with the adapter of each token."""
        if torch.compiler.is_compiling():  # dynamo cannot raise our exception: it shows the text
            raise RuntimeError("Ranges of tokens cannot be routed in a graph.")
        return super().forward(layer, args, kwargs)

    def linear(self, layer: LoRALinear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a layer that adds to its output, with the tokens as rows."""
        x = layer._lora_input(args, kwargs)
        if not self._packs(x):
            return super().linear(layer, args, kwargs)
        return super().linear(layer, (x.flatten(0, 1),), {})[None]

    def embedding(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look tokens up, as rows of one."""
        ids = layer._lora_input(args, kwargs)
        if not self._packs(ids):
            return super().embedding(layer, args, kwargs)
        return super().embedding(layer, (ids.flatten(0, 1)[:, None],), {}).movedim(0, 1)

    def reading(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer whose weights are read."""
        entries = self.entries_read(layer)
        copies = is_rowwise(layer._lora_plain) and all(entry.spec is None for entry in entries)
        if entries and copies and args and self._packs(args[0]):
            return apart(self, layer, args, kwargs, dim=1)
        return super().reading(layer, args, kwargs)

    def check(self, layer: Any, x: Tensor) -> None:
        """Refuse an input whose first dimension is not the tokens.

        Raises:
            LayerError: It has another length, or time may come before the batch.
        """
        if x.shape[0] != len(self.rows):
            self._refuse(layer, x)
        refuse_ambiguous(layer, x, len(self.rows), 1)

    def _packs(self, x: Tensor) -> bool:
        """Whether an input is one row of the tokens, and no other axis may be."""
        n = len(self.rows)
        if x.dim() < 2 or x.shape[:2] != (1, n):
            return False
        return n not in x.shape[2:-1]  # (1, heads, tokens, ...) with as many heads is refused

    def _refuse(self, layer: Any, x: Tensor) -> None:
        raise LayerError(
            f"routed() with {len(self.rows):,} tokens",
            f"a {type(layer).__name__} got an input of shape {tuple(x.shape)}, which is not "
            "(1, tokens, ...) or (tokens, ...) with these tokens",
            "Pack all sequences into one row, and give the number of tokens of each",
        )
