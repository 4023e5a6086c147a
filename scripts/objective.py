"""The conditional objective of the LoRA paper, eq. (1) and (2): log p(target | context).

The sum in eq. (2) runs over the target's tokens only, so only the positions that predict
one of them need logits. A decoder's head is a large part of its work (a fifth of the arithmetic of
a 135M model with 49,152 tokens), and targets are a sixth of the tokens here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pairs import IGNORED

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["target_log_probs"]


def target_log_probs(
    model: PreTrainedModel, tokens: Tensor, labels: Tensor, **kwargs: Any
) -> Tensor:
    """Log-probability of each target token, given all tokens before it.

    Args:
        model: A causal language model of transformers (a decoder with a head).
        tokens: (n, length).
        labels: (n, length), `IGNORED` outside the targets, as `pairs.collate` makes them.
        **kwargs: Passed on to the decoder, such as `past_key_values`.

    Returns:
        (n_target_tokens,) float32, row by row. The loss is the negative of its mean.
    """
    hidden = model.get_decoder()(tokens, **kwargs).last_hidden_state  # (n, length, dim)
    predicts = labels[:, 1:] != IGNORED  # the state at i predicts the token at i + 1
    logits = model.get_output_embeddings()(hidden[:, :-1][predicts]).float()  # (n_target, vocab)
    wanted = labels[:, 1:][predicts]
    return logits.log_softmax(-1).gather(1, wanted[:, None]).squeeze(1)
