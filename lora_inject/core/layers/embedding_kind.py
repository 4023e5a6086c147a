"""Embeddings: an update of the rows that are looked up.

The table of an embedding is a weight `(num, dim)` whose input is a one-hot vector, so `x A^T` is a
lookup in A. As in the paper's code (loralib `layers.Embedding`), A starts at zero and B is random:
rows of tokens that are not in the training data do not change. With `max_norm` torch renormalizes
rows of W in place during the forward: here those of `W + delta` are, out of place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_inject.core.functional.factors import Update
from lora_inject.core.functional.gain import gained
from lora_inject.core.functional.lookup import embedding, renormalized
from lora_inject.core.functional.torch_inside import in_trace
from lora_inject.core.layers.adapted import keeps_forward
from lora_inject.core.layers.forward_update import ForwardUpdate
from lora_inject.core.layers.reading import formed_weight
from lora_inject.core.spec.sites import Geometry
from lora_inject.errors import LayerError


class LoRAEmbedding(ForwardUpdate):
    """Forward update of `nn.Embedding`: `W[ids] + scale * A[:, ids]^T B^T`."""

    kind = "embedding"
    classes = (nn.Embedding,)
    num_embeddings: int
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool

    @staticmethod
    def geometry(module: Any) -> Geometry:
        """Return the table's length as the input and its width as the output."""
        num, dim = int(module.num_embeddings), int(module.embedding_dim)
        return Geometry(num, dim, (num, dim), transposed=True)

    @classmethod
    def adds_to_output(cls, module: nn.Module, *, stock: bool) -> bool:
        """Return False for `scale_grad_by_freq`, which changes the gradient of a read weight."""
        return stock and not module.scale_grad_by_freq

    @staticmethod
    def stock(plain: type[nn.Module]) -> bool:
        """Return whether `forward` is nn.Embedding's own, and the weight a parameter."""
        is_torchs = plain.forward is nn.Embedding.forward and keeps_forward(plain)
        return is_torchs and not hasattr(plain, "weight")

    def _lora_with_updates(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], updates: Sequence[Update]
    ) -> Any:
        """Look rows up with a sum of updates."""
        rows, ids = self._lora_updated(args, kwargs, updates)
        return self._lora_finished(rows, ids, None)

    def _lora_with_gain(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        updates: Sequence[Update],
        gain: Tensor,
    ) -> Any:
        """Look rows up with a sum of updates, and multiply by a gain."""
        rows, ids = self._lora_updated(args, kwargs, updates)
        return self._lora_finished(rows, ids, gain)

    def _lora_without_updates(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look rows up in the plain table."""
        return self._lora_rows(
            self._lora_input(args, kwargs), self._lora_own("weight"), self.max_norm
        )

    def _lora_updated(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], updates: Sequence[Update]
    ) -> tuple[Tensor, Tensor]:
        """Return looked-up rows with updates, before a gain and before their norm, and the ids."""
        ids, weight = self._lora_input(args, kwargs), self._lora_own("weight")
        self._lora_check_rows(updates[0].A.shape[1])
        if hasattr(weight, "full_tensor"):  # a DTensor does not support adding to single rows
            return self._lora_rows(ids, formed_weight(self), None), ids
        base = self._lora_rows(ids, weight, None)
        rows = embedding(base, ids, updates, self.padding_idx, float32=self._lora.float32)
        return rows, ids

    def _lora_finished(self, rows: Tensor, ids: Tensor, gain: Tensor | None) -> Tensor:
        """Multiply looked-up rows by a gain, and enforce their norm."""
        if gain is not None:
            if self.padding_idx is not None:  # no gradient from the padding row
                padding = (ids == self.padding_idx).unsqueeze(-1)
                gain = torch.where(padding, gain.detach(), gain)
            rows = gained(rows, rows, gain)
        return rows if self.max_norm is None else renormalized(rows, self.max_norm, self.norm_type)

    def _lora_check_rows(self, num: int) -> None:
        """Raise if the table has other rows than A, which has `num`."""
        if not in_trace() and num != self.num_embeddings:
            raise LayerError(
                "an embedding with an adapter",
                f"it was resized from {num} to {self.num_embeddings} rows after inject",
                "Eject first, resize, then inject again",
            )

    def _lora_rows(self, ids: Tensor, weight: Tensor, max_norm: float | None) -> Tensor:
        """Look up rows as nn.Embedding does; a `max_norm` renormalizes W in place."""
        options = (self.norm_type, self.scale_grad_by_freq, self.sparse)
        return F.embedding(ids, weight, self.padding_idx, max_norm, *options)
