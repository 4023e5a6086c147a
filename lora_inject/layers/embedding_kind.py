"""Embeddings: `nn.Embedding` and its subclasses with the same forward.

The table is a weight `(num, dim)` whose input is a one-hot vector, so `x A^T` is a lookup
in A. As in the paper's code (loralib `layers.Embedding`), A starts at zero and B is random: rows
of tokens that are not in the training data do not change.

With `max_norm` torch renormalizes rows of W in place during the forward. A plain table with the
weight `W + delta` would return renormalized `W + delta`. This is computed here out of place, and
the adapter never changes W.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_inject.errors import LayerError
from lora_inject.functional.gain import gained
from lora_inject.functional.lookup import embedding, renormalized, routed_embedding
from lora_inject.layers.attached import held_by
from lora_inject.layers.forward_update import ForwardUpdate
from lora_inject.layers.routed_forward import apart
from lora_inject.layers.selection import State
from lora_inject.spec.inventory import Geometry


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
    def adds_to_output(cls, module: nn.Module) -> bool:
        """Return False for `scale_grad_by_freq`, which changes the gradient of a read weight."""
        return super().adds_to_output(module) and not module.scale_grad_by_freq

    @staticmethod
    def stock(plain: type[nn.Module]) -> bool:
        """Return whether `forward` is nn.Embedding's own, and the weight a parameter."""
        return plain.forward is nn.Embedding.forward and not hasattr(plain, "weight")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Look rows up with the adapters that take part."""
        if not isinstance(self, LoRAEmbedding):  # somebody kept this method; the adapter is gone
            return type(self).forward(self, *args, **kwargs)
        attached, ids = self._lora, self._lora_input(args, kwargs)
        weight, state = self._lora_own("weight"), attached.selection.current()
        if hasattr(weight, "full_tensor"):  # a DTensor does not support adding to single rows
            return self._lora_rows(ids, self._lora_formed(), self.max_norm)
        if state.routed:
            return self._lora_by_rows(ids, weight, state)
        alone, gain = attached.gained(state) if attached.gains else None, None
        compiling = torch.compiler.is_compiling()
        if compiling:
            updates = self._lora_compiled(weight, state)
        else:
            updates = self._lora_updates(state, compiling=False)
        if not updates:
            return self._lora_rows(ids, weight, self.max_norm)
        self._lora_refuse_resized(updates[0].A.shape[1])
        base = self._lora_rows(ids, weight, None)
        found = embedding(base, ids, updates, self.padding_idx, float32=attached.float32)
        if alone is not None:
            gain = self._lora_gain(alone, weight, attached.chosen(state, compiling))
        return self._lora_finished(found, ids, gain)

    def _lora_by_rows(self, ids: Tensor, weight: Any, state: State) -> Any:
        """Look rows up with the update, and the gain, of each row's own adapter."""
        if state.one_pass is not None and not state.alone:
            return apart(self, functools.partial(LoRAEmbedding.forward, self), state, (ids,), {})
        if state.packs(ids):
            return self.forward(ids.flatten(0, 1)).reshape(*ids.shape, -1)
        routing = self._lora_routing(ids, state)
        if not routing.entries:
            return self._lora_rows(ids, weight, self.max_norm)
        attached, gain = self._lora, None
        adapters = routing.factors(held_by(self), training=self.training)
        base, rows = self._lora_rows(ids, weight, None), routing.places
        found = routed_embedding(
            base, ids, rows, adapters, self.padding_idx, float32=attached.float32
        )
        if attached.gains:
            gain = self._lora_gains(routing, weight, found.dim())
        return self._lora_finished(found, ids, gain)

    def _lora_finished(self, rows: Tensor, ids: Tensor, gain: Tensor | None) -> Tensor:
        """Multiply looked-up rows by a gain, and enforce their norm."""
        if gain is not None:
            if self.padding_idx is not None:  # no gradient from the padding row
                padding = (ids == self.padding_idx).unsqueeze(-1)
                gain = torch.where(padding, gain.detach(), gain)
            rows = gained(rows, rows, gain)
        return rows if self.max_norm is None else renormalized(rows, self.max_norm, self.norm_type)

    def _lora_refuse_resized(self, num: int) -> None:
        if num != self.num_embeddings:
            raise LayerError(
                "an embedding with an adapter",
                f"it was resized from {num} to {self.num_embeddings} rows after inject",
                "Eject first, resize, then inject again",
            )

    def _lora_rows(self, ids: Tensor, weight: Tensor, max_norm: float | None) -> Tensor:
        """Look up rows as nn.Embedding does; a `max_norm` renormalizes W in place."""
        options = (self.norm_type, self.scale_grad_by_freq, self.sparse)
        return F.embedding(ids, weight, self.padding_idx, max_norm, *options)
