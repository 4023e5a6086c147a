"""Tied weights: which head a checkpoint leaves out because it equals an embedding.

One idea: a tied tensor is in the file once, under the embedding's name. Adapting either end
unties them: the head becomes a tensor of its own and `tie_word_embeddings` becomes false. So all
that is needed is the name of the head that goes with an embedding, and the reverse.

What is not here: ties inside an encoder-decoder (T5's `shared`), which are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.safetensors_file import TensorEntry
from lora_inject.errors import CheckpointError

__all__ = ["embedding_of_head", "head_of_embedding", "is_embedding", "is_head", "tie_flags"]

_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
    "tokens_embed.weight",
)
_HEADS = (
    "lm_head.weight",
    "embed_out.weight",
    "lm_head.decoder.weight",
    "cls.predictions.decoder.weight",
    "vocab_projector.weight",
)
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")
_MASKED = ("ForMaskedLM", "ForPreTraining")
_MASKED_HEADS = {
    "bert": "cls.predictions.decoder.weight",
    "roberta": "lm_head.decoder.weight",
    "xlm-roberta": "lm_head.decoder.weight",
    "camembert": "lm_head.decoder.weight",
    "distilbert": "vocab_projector.weight",
}


def is_embedding(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether a tensor is a table of word embeddings, by its name or by its rows."""
    if any(name == e or name.endswith("." + e) for e in _EMBEDDINGS):
        return True
    entry = checkpoint.tensors.get(name)
    if entry is None or len(entry.shape) != 2 or is_head(name):
        return False
    return entry.shape[0] in {table.get("vocab_size") for table in _tables(checkpoint.config)}


def is_head(name: str) -> bool:
    """Return whether a tensor is, by its name, the matrix of an output head."""
    return any(name == h or name.endswith("." + h) for h in _HEADS)


def tie_flags(config: Mapping[str, Any]) -> list[bool]:
    """Return the values of `tie_word_embeddings` that a config states, inner configs included."""
    tables = _tables(config)
    return [bool(t["tie_word_embeddings"]) for t in tables if "tie_word_embeddings" in t]


def _tables(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a config and the configs inside it."""
    return [config, *(v for v in config.values() if isinstance(v, dict))]


def embedding_of_head(checkpoint: Checkpoint, head: str) -> TensorEntry | None:
    """Return the embedding that an absent head is tied to, None where there is none.

    Args:
        checkpoint: The base.
        head: Name of a tensor that the checkpoint does not hold.

    Returns:
        The embedding; None where `head` is no head or the file has another one.
    """
    if not is_head(head) or any(is_head(name) for name in checkpoint.tensors):
        return None
    if checkpoint.config.get("is_encoder_decoder"):
        return None
    found = [e for e in checkpoint if len(e.shape) == 2 and is_embedding(checkpoint, e.name)]
    return found[0] if len(found) == 1 else None


def head_of_embedding(checkpoint: Checkpoint, embedding: str) -> str | None:
    """Return the name of the head that is tied to an embedding and absent from the checkpoint.

    Args:
        checkpoint: The base.
        embedding: Name of an embedding that is about to change.

    Returns:
        The head's name; None where the model has no such head or the file holds it apart.

    Raises:
        CheckpointError: There is a tied head, and this library does not know its name.
    """
    config = checkpoint.config
    if any(is_head(name) for name in checkpoint.tensors):
        return None
    architectures = [a for a in config.get("architectures") or () if isinstance(a, str)]
    flags = tie_flags(config)
    if not architectures or (flags and not any(flags)):
        return None
    if config.get("is_encoder_decoder"):
        raise CheckpointError(
            f"merge into the embedding '{embedding}'",
            f"{architectures[0]} shares it between encoder, decoder and head",
            "Adapt other layers, or untie the base first (tie_word_embeddings=False)",
        )
    if any(a.endswith(_CAUSAL) for a in architectures):
        inner = embedding.startswith("language_model.model.")
        return "language_model.lm_head.weight" if inner else "lm_head.weight"
    if any(a.endswith(_MASKED) for a in architectures):
        known = _MASKED_HEADS.get(str(config.get("model_type")))
        if known is not None:
            return known
        raise CheckpointError(
            f"merge into the embedding '{embedding}'",
            f"{architectures[0]} ties its output head to it, and the head's name is not known here",
            "Untie the base first: save it with tie_word_embeddings=False",
        )
    return None
