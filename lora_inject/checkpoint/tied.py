"""Tied weights: what a checkpoint leaves out because it equals an embedding.

A tied tensor is in the file once, under the embedding's name. Adapting any end unties
them all, as one flag of the config speaks for all: what was left out becomes a tensor of its own
and `tie_word_embeddings` becomes false. So all that is needed is the names of what goes with an
embedding. Source: `_tied_weights_keys` of transformers' classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_inject.checkpoint.index import Checkpoint
from lora_inject.errors import CheckpointError
from lora_inject.storage.safetensors_file import TensorEntry

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
    "predictions.decoder.weight",
    "generator_lm_head.weight",
    "vocab_projector.weight",
)
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")
_MASKED = ("ForMaskedLM", "ForPreTraining")
_BERT, _ROBERTA = ("cls.predictions.decoder", "cls.predictions"), ("lm_head.decoder", "lm_head")
_MASKED_HEADS: Mapping[str, tuple[str, str]] = {
    "albert": ("predictions.decoder", "predictions"),
    "bert": _BERT,
    "camembert": _ROBERTA,
    "deberta": _BERT,
    "deberta-v2": _BERT,
    "distilbert": ("vocab_projector", "vocab_projector"),
    "electra": ("generator_lm_head", "generator_lm_head"),
    "modernbert": ("decoder", "decoder"),
    "mpnet": _ROBERTA,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}
"""Model type to the output head and the module that the file keeps the head's bias under."""
_SEPARABLE = ("bart", "mbart", "pegasus", "plbart", "m2m_100", "blenderbot", "blenderbot-small")
"""Encoder-decoders that load their parts apart where `tie_word_embeddings` is false."""


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
    return name == "decoder.weight" or any(name == h or name.endswith("." + h) for h in _HEADS)


def tie_flags(config: Mapping[str, Any]) -> list[bool]:
    """Return the values of `tie_word_embeddings` that a config states, inner configs included."""
    tables = _tables(config)
    return [bool(t["tie_word_embeddings"]) for t in tables if "tie_word_embeddings" in t]


def _tables(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a config and the configs inside it."""
    return [config, *(v for v in config.values() if isinstance(v, dict))]


def source_of_tied(checkpoint: Checkpoint, name: str) -> TensorEntry | None:
    """Return the embedding that an absent tensor is tied to, None where there is none.

    Args:
        checkpoint: The base.
        name: Of a tensor that the checkpoint does not hold, such as its head.

    Returns:
        The embedding; None where `name` is nothing that is tied, or the file has a head.

    Raises:
        CheckpointError: It is tied, and the class cannot load it apart.
    """
    if checkpoint.config.get("is_encoder_decoder"):
        return _source_in_encoder_decoder(checkpoint, name)
    if not is_head(name) or any(is_head(other) for other in checkpoint.tensors):
        return None
    tables = [e for e in checkpoint if len(e.shape) == 2 and is_embedding(checkpoint, e.name)]
    named = [e for e in tables if e.name.endswith(_EMBEDDINGS)]  # surer than the number of rows
    found = named or tables
    return found[0] if len(found) == 1 else None


def _source_in_encoder_decoder(checkpoint: Checkpoint, name: str) -> TensorEntry | None:
    for embedding in ("shared.weight", "model.shared.weight"):
        entry = checkpoint.tensors.get(embedding)
        if entry is not None and name in _shared_with(checkpoint, embedding):
            if checkpoint.config.get("model_type") not in _SEPARABLE:
                raise _inseparable(checkpoint, name, embedding)
            return entry
    return None


def _shared_with(checkpoint: Checkpoint, embedding: str) -> tuple[str, ...]:
    """Return what an encoder-decoder computes from its one embedding and does not store."""
    inner = embedding.removesuffix("shared.weight")
    names = (f"{inner}encoder.embed_tokens.weight", f"{inner}decoder.embed_tokens.weight")
    return tuple(n for n in (*names, "lm_head.weight") if n not in checkpoint.tensors)


def _inseparable(checkpoint: Checkpoint, name: str, embedding: str) -> CheckpointError:
    return CheckpointError(
        f"merge into '{name}'",
        f"it is not stored: encoder, decoder and head share '{embedding}', and a model of type "
        f"{checkpoint.config.get('model_type')!r} cannot be told to load them apart",
        "Adapt other layers, or keep this adapter unmerged",
    )


def check_is_read(checkpoint: Checkpoint, embedding: str) -> None:
    """Refuse an update of what an encoder-decoder stores and reads only through other names.

    Raises:
        CheckpointError: The update would have no effect in the adapted model.
    """
    if checkpoint.config.get("is_encoder_decoder") and embedding.endswith("shared.weight"):
        raise CheckpointError(
            f"merge into '{embedding}'",
            "encoder, decoder and head read it by names of their own, so that an adapter on this "
            "one has no effect",
            "Adapt 'embed_tokens' and 'lm_head', or other layers",
        )


def tied_copies(checkpoint: Checkpoint, embedding: str) -> Mapping[str, str]:
    """Return what has to be stored when an embedding and its head are to differ.

    Args:
        checkpoint: The base.
        embedding: Name of an embedding that the checkpoint holds.

    Returns:
        Name of each tensor that is left out to name of the one it equals: the head, its bias where
        the same flag ties that. Empty where the model has no such head or the file holds it.

    Raises:
        CheckpointError: There is a tied head, and this library does not know its name.
    """
    config = checkpoint.config
    architectures = [a for a in config.get("architectures") or () if isinstance(a, str)]
    flags = tie_flags(config)
    if config.get("is_encoder_decoder") and embedding.endswith("shared.weight"):
        return dict.fromkeys(_shared_with(checkpoint, embedding), embedding)
    if any(is_head(name) for name in checkpoint.tensors):
        return {}
    if not architectures or (flags and not any(flags)):
        return {}
    if any(a.endswith(_CAUSAL) for a in architectures):
        inner = embedding.startswith("language_model.model.")
        return {"language_model.lm_head.weight" if inner else "lm_head.weight": embedding}
    if any(a.endswith(_MASKED) for a in architectures):
        return _masked_copies(checkpoint, embedding, architectures[0])
    return {}


def _masked_copies(checkpoint: Checkpoint, embedding: str, architecture: str) -> Mapping[str, str]:
    known = _MASKED_HEADS.get(str(checkpoint.config.get("model_type")))
    if known is None:
        raise CheckpointError(
            f"merge into the embedding '{embedding}'",
            f"{architecture} ties its output head to it, and the head's name is not known here",
            "Untie the base first: save it with tie_word_embeddings=False",
        )
    head, bias = known
    copies = {f"{head}.weight": embedding}
    if f"{bias}.bias" in checkpoint.tensors and f"{head}.bias" not in checkpoint.tensors:
        copies[f"{head}.bias"] = f"{bias}.bias"
    return copies
