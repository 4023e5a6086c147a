"""Facts from the base's config.json, as transformers writes it, that some formats need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_inject.errors import FormatError

_REMEDY = "Pass config, the base's config.json as plain data, or convert it with its base: "
_REMEDY += "lora-inject convert ADAPTER OUT --to FORMAT --base BASE"


class Heads(NamedTuple):
    """Sizes of a decoder: q has the rows of `n_heads` heads, k of `n_kv_heads`."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int


def text_config(config: Mapping[str, Any] | None, asked: str, why: str) -> Mapping[str, Any]:
    """Return the config of the language model, which may be nested."""
    if not config:
        raise FormatError(asked, f"it depends on the base {why}", _REMEDY)
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, Mapping) else config


def heads(config: Mapping[str, Any] | None, asked: str, why: str) -> Heads:
    """Return the sizes that permutations and fused projections depend on."""
    config = text_config(config, asked, why)
    n_heads = _count(config, "num_attention_heads", asked)
    grouped = config.get("num_key_value_heads") is not None
    n_kv_heads = _count(config, "num_key_value_heads", asked) if grouped else n_heads
    given = config.get("head_dim") is not None
    head_dim = _count(config, "head_dim" if given else "hidden_size", asked)
    layers = _count(config, "num_hidden_layers", asked)
    return Heads(layers, n_heads, n_kv_heads, head_dim if given else head_dim // n_heads)


def _count(config: Mapping[str, Any], field: str, asked: str) -> int:
    value = config.get(field)
    if type(value) is not int or not 0 < value < 1 << 30:
        raise FormatError(asked, f"{field!r} of the base's config is {str(value)[:40]!r}", _REMEDY)
    return value


def refuse_tied(config: Mapping[str, Any] | None, name: str, asked: str, client: str) -> None:
    """Refuse a site on an embedding or a head that the client holds as one tensor.

    In that client the update of one would change the other as well.
    """
    config = text_config(config, asked, "whether the embedding and the head are tied")
    tied, where = config.get("tie_word_embeddings"), f"{asked}, site '{name}'"
    if tied:
        raise FormatError(
            where,
            f"{client} holds the embedding and the head of this base as one tensor",
            "Merge the adapter into the base (lora-inject merge), or leave that site out",
        )
    if tied is not False:
        found = "the config does not say whether the embedding and the head are tied"
        raise FormatError(where, found, _REMEDY)
