"""Files of llama.cpp for Llama-like decoders: GGUF, which is only written.

A file has `blk.0.attn_q.weight.lora_a` (A), `.lora_b` (B) and one alpha for all. The scale is alpha
over the rank of each pair, so ranks may differ; if scales would need several alphas, they are
folded into B. The A of an embedding is transposed. Needs the package `gguf`.

Llama's rotary embedding rotates pairs of values. Transformers stores the first values of all pairs
of a head, then the second ones; llama.cpp, as Meta's code, stores each pair side by side. So the
rows of q and k, and of their B, have another order there.

Source: llama.cpp, convert_lora_to_gguf.py, conversion/llama.py (`permute`), src/llama-adapter.cpp.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from lora_inject.core.adapter.file_keys import one_line
from lora_inject.core.adapter.state import AdapterState
from lora_inject.errors import FormatError, within
from lora_inject.formats.format import Files
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.pairs import plain_sites

_OUTSIDE = ("model.embed_tokens", "lm_head")
_PLAIN = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""llama.cpp's name of a module by that of transformers, within its layer or outside of layers."""

_FUSED = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Family(NamedTuple):
    """How llama.cpp calls the models of a `model_type`, and holds their q and k.

    Attributes:
        architecture: Its name of them.
        names: Its names of their modules.
        in_pairs: Whether the rows of q and k are in the order of Meta's code.
    """

    architecture: str
    names: dict[str, str] = _PLAIN
    in_pairs: bool = False


FAMILIES = {
    "llama": Family("llama", in_pairs=True),
    "mistral": Family("llama", in_pairs=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma"),
    "gemma2": Family("gemma2"),
    "gemma3_text": Family("gemma3"),
    "phi3": Family("phi3", _FUSED),
}
"""By `model_type`: models whose other matrices llama.cpp keeps as they are."""

_LAYER = re.compile(r"model\.layers\.(\d{1,4})\.(.+)")


def detects(files: Files) -> bool:
    """Whether a path is a GGUF file."""
    if not files.path.is_file():
        return False
    with files.path.open("rb") as file:
        return file.read(4) == b"GGUF"


def read(_path: Path, _facts: ModelFacts) -> NoReturn:
    """Refuse such a file."""
    remedy = "Keep the PEFT folder that it was converted from, and give that"
    raise FormatError("", "it is a GGUF file, and these are only written", remedy)


def write(
    state: AdapterState, _path: Path, facts: ModelFacts, *, dtype: str | None = None
) -> bytes:
    """Write an adapter of linear layers and embeddings of a model of `FAMILIES` for llama.cpp.

    The base's config gives its architecture, heads and ties. `dtype` is `float32`, the default,
    or `float16`.
    """
    gguf = _library()
    if dtype not in (None, "float32", "float16"):
        raise FormatError("", f"dtype is {dtype!r}", "Give float32 or float16")
    others = "; for others write --to portable and use llama.cpp's convert_lora_to_gguf.py"
    family = FAMILIES[facts.model_type(FAMILIES, "how llama.cpp calls its tensors", others)]
    kinds = ("linear", "embedding")
    sites = plain_sites(state, "llama.cpp", kinds, dtype=dtype or "float32", alpha="one")
    for name in filter(sites.__contains__, _OUTSIDE):
        facts.refuse_tied(name, "llama.cpp")
    tensors: dict[str, Tensor] = {}
    for name, site in sites.items():
        with within(f"site '{name}'"):
            key, n_heads = _key(name, family), _n_heads(name, family, facts, len(site.B))
        tensors[f"{key}.lora_a"] = site.A.T if name == "model.embed_tokens" else site.A
        tensors[f"{key}.lora_b"] = in_pairs(site.B, n_heads) if n_heads else site.B
    first = next(iter(sites.values()))
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "adapter.gguf")
        writer = gguf.GGUFWriter(file, family.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, first.scale * first.spec.rank)
        for key, tensor in tensors.items():
            writer.add_tensor(key, tensor.detach().cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file.read_bytes()


def _key(name: str, family: Family) -> str:
    """Return llama.cpp's name of the weight of a module."""
    match, part = _LAYER.fullmatch(name), _part(name)
    if part not in family.names:
        remedy = f"It names {one_line(family.names, 12)}; merge the adapter into its base instead"
        raise FormatError("", "the format has no name for this module", remedy)
    return (f"blk.{match[1]}." if match else "") + f"{family.names[part]}.weight"


def _part(name: str) -> str:
    """Return a module's name within its layer."""
    match = _LAYER.fullmatch(name)
    return name if match is None else match[2]


def _n_heads(name: str, family: Family, facts: ModelFacts, n_rows: int) -> int:
    """Return the number of heads of q or k if their rows are in pairs, else 0."""
    part = _part(name)
    if not family.in_pairs or part not in ("self_attn.q_proj", "self_attn.k_proj"):
        return 0
    sizes = facts.heads("how many heads q and k have")
    n_heads = sizes.n_heads if part == "self_attn.q_proj" else sizes.n_kv_heads
    if n_rows != n_heads * sizes.head_dim or sizes.head_dim % 2:
        problem = f"B has {n_rows} rows, and the base has {n_heads} heads of {sizes.head_dim}"
        raise FormatError("", problem, "Name the base that the adapter was made for")
    return n_heads


def in_pairs(rows: Tensor, n_heads: int) -> Tensor:
    """Return rows `(n, r)` of transformers in the order of Meta's code.

    Examples:
        >>> in_pairs(torch.arange(4)[:, None], 1).flatten().tolist()
        [0, 2, 1, 3]
    """
    return rows.reshape(n_heads, 2, -1, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise FormatError("", "the package gguf is missing", "Run pip install gguf") from None
    return gguf


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by llama.cpp's names, copied, for `check` to look at."""
    try:
        stored = _library().GGUFReader(path).tensors
        return {t.name: torch.from_numpy(t.data.copy()) for t in stored}
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, RecursionError) as error:
        raise FormatError("", f"it is damaged ({error})"[:300], "Fetch it again") from error
