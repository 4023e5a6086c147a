"""Embeddings: `nn.Embedding` and its subclasses that look rows up the plain way.

The table is a weight `(num, dim)` whose input is a one-hot vector, so `x A^T` is a lookup
in A. As in the paper's code (loralib `layers.Embedding`), A starts at zero and B is random: rows
of tokens that training never saw stay what they were.

With `max_norm` torch renormalises rows of W in place during the forward. What a plain table with
the weight `W + delta` would return is renormalised `W + delta`; that is computed here out of place,
and the adapter never changes W.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lora_inject.errors import LayerError
from lora_inject.functional import embedding, renormalised, routed_embedding
from lora_inject.layers.adapted import Geometry
from lora_inject.layers.forward_update import ForwardUpdate


class LoRAEmbedding(ForwardUpdate):
    """Forward update of `nn.Embedding`: `W[ids] + scale * A[:, ids]^T B^T`."""

    kind = "embedding"
    weight: Tensor
    num_embeddings: int
    padding_idx: int | None
    max_norm: float | None
    norm_type: float

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return whether the module is an `nn.Embedding`."""
        return isinstance(module, nn.Embedding)

    @staticmethod
    def geometry(module: nn.Module) -> Geometry:
        """Return the table's length as the input and its width as the output."""
        num, dim = int(module.num_embeddings), int(module.embedding_dim)  # type: ignore[arg-type]
        return Geometry(num, dim, (num, dim), transposed=True)

    @staticmethod
    def adds_to_output(module: nn.Module) -> bool:
        """Return False for `scale_grad_by_freq`, which changes the gradient of a read weight."""
        return not module.scale_grad_by_freq

    @staticmethod
    def stock(plain: type[nn.Module]) -> bool:
        """Return whether `forward` is nn.Embedding's own."""
        return plain.forward is nn.Embedding.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Look rows up with the adapters that take part.

        Args:
            *args: For the layer's own forward; the first is the ids, `(...)`, integer.
            **kwargs: For the layer's own forward; the first is the ids where there are no `args`.

        Returns:
            `(..., embedding_dim)`.

        Raises:
            LayerError: The table was resized after inject, or `routed` got another batch.
        """
        ids: Tensor = args[0] if args else next(iter(kwargs.values()))
        state = self._lora.selection.current()
        if state.routed:
            routing = self._lora_routing(ids, state)
            if not routing.entries:
                return super().forward(*args, **kwargs)
            adapters = self._lora_routed_factors(routing)
            base, rows = self._lora_base(ids, args, kwargs), routing.places
            found = routed_embedding(
                base, ids, rows, adapters, self.padding_idx, float32=self._lora.float32
            )
            return self._lora_renorm(found)
        updates = self._lora_compiled(self.weight, state)
        updates = self._lora_updates(state) if updates is None else updates
        if not updates:
            return super().forward(*args, **kwargs)
        self._lora_refuse_resized(updates[0].A.shape[1])
        base = self._lora_base(ids, args, kwargs)
        float32 = self._lora.float32
        found = embedding(base, ids, updates, self.padding_idx, float32=float32)
        return self._lora_renorm(found)

    def _lora_refuse_resized(self, num: int) -> None:
        if num != self.num_embeddings:
            raise LayerError(
                "an embedding with an adapter",
                f"it was resized from {num} to {self.num_embeddings} rows after inject",
                "Eject first, resize, then inject again",
            )

    def _lora_base(self, ids: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Look up rows of W without torch's renormalisation in place."""
        if self.max_norm is None:
            found: Tensor = super().forward(*args, **kwargs)
            return found
        return F.embedding(ids, self.weight)

    def _lora_renorm(self, rows: Tensor) -> Tensor:
        if self.max_norm is None:
            return rows
        return renormalised(rows, self.max_norm, self.norm_type)
