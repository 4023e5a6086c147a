"""GGUF files of llama.cpp: `blk.0.attn_q.weight.lora_a` (A), `.lora_b` (B) and one alpha for all.

The scale is alpha over the rank of each pair, so ranks may differ; if scales would need several
alphas, they are folded into B. For the architecture `llama` the rows of q and k are in the
order of Meta's code. The A of an embedding is transposed. Needs the package `gguf`.

Source: llama.cpp, convert_lora_to_gguf.py, conversion/llama.py (`permute`), src/llama-adapter.cpp.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_inject.adapter.state import AdapterState
from lora_inject.errors import FormatError
from lora_inject.formats.base_config import heads, refuse_tied, text_config
from lora_inject.formats.decoder_names import (
    K,
    Q,
    from_pairs,
    heads_of,
    ours,
    part_of,
    theirs,
    to_pairs,
)
from lora_inject.formats.plain import (
    in_dtype,
    matrices,
    plain_site,
    plain_sites,
    with_one_alpha,
)
from lora_inject.storage.atomic import write_file

_NAMES = {
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
_FUSED = {
    **{mine: _NAMES[mine] for mine in ("model.embed_tokens", "lm_head")},
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_EMBEDDING, _LAYER = "model.embed_tokens", "blk.{}."


class Family(NamedTuple):
    """How llama.cpp stores the models of one `model_type` of transformers."""

    architecture: str
    names: Mapping[str, str] = _NAMES
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
"""Families by `model_type`: those whose other matrices llama.cpp does not change."""


def detects(path: Path) -> bool:
    """Whether a path is a GGUF file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def write(
    state: AdapterState,
    path: Path,
    *,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> Path:
    """Write an adapter for llama.cpp.

    Args:
        state: The adapter: linear layers and embeddings of a model of `FAMILIES`, nothing trained
            in full.
        path: The file, ending in `.gguf`.
        overwrite: Replace a file that is there already.
        config: The base's config as plain data, for its architecture, heads and ties.
        dtype: `float32` (the default) or `float16`.

    Returns:
        The file that was written.

    Raises:
        FormatError: The base is of another family, such a file cannot express something, or the
            package gguf is missing.
    """
    asked = f"write GGUF adapter to '{path}'"
    gguf = _library(asked)
    if path.suffix != ".gguf":
        raise FormatError(asked, "its name does not end in .gguf", "Rename it")
    if dtype not in (None, "float32", "float16"):
        raise FormatError(asked, f"dtype is {dtype!r}", "Give float32 or float16")
    family = _family(config, asked)
    sites = plain_sites(state, asked, kinds=("linear", "embedding"), client="llama.cpp")
    sites = in_dtype(with_one_alpha(sites), dtype or "float32", asked)
    tensors: dict[str, Tensor] = {}
    for name, site in sites.items():
        if name in (_EMBEDDING, "lm_head"):
            refuse_tied(config, name, asked, "llama.cpp")
        key = theirs(name, family.names, _LAYER, asked) + ".weight"
        a, b = site.A.T if name == _EMBEDDING else site.A, site.B
        n_heads = _n_heads(family, name, config, len(b), asked)
        tensors[f"{key}.lora_a"] = a
        tensors[f"{key}.lora_b"] = to_pairs(b, n_heads) if n_heads else b
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
        return write_file(path, file.read_bytes(), overwrite=overwrite)


def read(path: Path, *, config: Mapping[str, Any] | None = None) -> AdapterState:
    """Read an adapter for llama.cpp.

    Args:
        path: The file.
        config: The base's config as plain data, for the heads of the architecture `llama`.

    Returns:
        The adapter, under transformers' names.

    Raises:
        FormatError: The file is damaged, holds a model or another kind of adapter, is of another
            family, or has quantized tensors.
    """
    asked = f"read GGUF adapter '{path}'"
    fields, tensors = _content(path, asked)
    found = {key: fields.get(key) for key in ("general.type", "adapter.type")}
    if found != {"general.type": "adapter", "adapter.type": "lora"}:
        raise FormatError(asked, f"it says {found}", "Give a LoRA adapter, not a model")
    architecture, alpha = fields.get("general.architecture"), fields.get("adapter.lora.alpha")
    families = [f for f in FAMILIES.values() if f.architecture == architecture]
    if not families:
        raise FormatError(
            asked,
            f"its architecture is {str(architecture)[:40]!r}",
            f"Supported are {', '.join(FAMILIES)}",
        )
    if config is not None and _family(config, asked).architecture != architecture:
        raise FormatError(asked, f"its architecture is '{architecture}'", "Name its own base")
    if not isinstance(alpha, float):
        raise FormatError(asked, f"its 'adapter.lora.alpha' is {alpha!r}", "Fetch it again")
    family, ends = families[0], (".weight.lora_a", ".weight.lora_b")
    remedy = "Norms and experts of GGUF adapters are not read"
    sites = {}
    for key, (a, b) in matrices(tensors, ends, asked, remedy).items():
        where = f"{asked}, '{key[:200]}'"
        name = ours(key, family.names, _LAYER, where)
        embedding = name == _EMBEDDING
        n_heads = _n_heads(family, name, config, len(b), where)
        plain = a.T.contiguous() if embedding else a, from_pairs(b, n_heads) if n_heads else b
        sites[name] = plain_site(name, *plain, alpha, where, embedding=embedding)
    return AdapterState(sites)


def _n_heads(
    family: Family, name: str, config: Mapping[str, Any] | None, n_rows: int, asked: str
) -> int:
    """Return the number of heads of q or k if their rows are in pairs, else 0."""
    if not family.in_pairs or part_of(name) not in (Q, K):
        return 0
    sizes = heads(config, asked, "how many heads q and k have")
    return heads_of(name, sizes, n_rows, asked)


def _family(config: Mapping[str, Any] | None, asked: str) -> Family:
    kind = text_config(config, asked, "how llama.cpp calls its tensors").get("model_type")
    if kind not in FAMILIES:
        raise FormatError(
            asked,
            f"the base's model_type is {str(kind)[:40]!r}",
            f"Supported are {', '.join(FAMILIES)}; for others write it with --to portable and use "
            "llama.cpp's convert_lora_to_gguf.py",
        )
    return FAMILIES[kind]


def _library(asked: str) -> Any:
    try:
        import gguf
    except ImportError:
        raise FormatError(asked, "the package gguf is missing", "Run pip install gguf") from None
    return gguf


def _content(path: Path, asked: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the scalar fields and the tensors of a file, copied."""
    gguf = _library(asked)
    try:
        reader = gguf.GGUFReader(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if name.startswith(("general.", "adapter.")) and len(field.data) == 1
        }
        tensors = {}
        for tensor in reader.tensors:
            if tensor.tensor_type.name not in ("F32", "F16"):
                found = f"'{tensor.name[:200]}' is of type {tensor.tensor_type.name}"
                raise FormatError(asked, found, "Convert it with --outtype f32")
            wanted = "float16" if tensor.tensor_type.name == "F16" else "float32"
            tensors[tensor.name] = torch.from_numpy(tensor.data.astype(wanted))
    except FormatError:
        raise
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, RecursionError) as error:
        raise FormatError(asked, f"it is damaged ({error})"[:300], "Fetch it again") from error
    return fields, tensors
