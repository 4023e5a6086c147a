"""GGUF files of llama.cpp: `blk.0.attn_q.weight.lora_a` (A), `.lora_b` (B) and one alpha for all.

The scale is alpha over the rank of each pair, so ranks may differ; if scales would need several
alphas, they are folded into B. For the architecture `llama` the rows of q and k are in the
order of Meta's code. The A of an embedding is transposed. Needs the package `gguf`.

Source: llama.cpp, convert_lora_to_gguf.py, conversion/llama.py (`permute`), src/llama-adapter.cpp.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_inject.core.adapter.state import AdapterState
from lora_inject.errors import FormatError
from lora_inject.formats.decoder_names import Decoder
from lora_inject.formats.format import Files
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.pairs import plain_site, plain_sites

_OUTSIDE = {"model.embed_tokens": "token_embd", "lm_head": "output"}
_NAMES = {
    **_OUTSIDE,
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FUSED = {
    **_OUTSIDE,
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ENDS = (".weight.lora_a", ".weight.lora_b")
_DTYPES = {"F32": "float32", "F16": "float16"}
_PLAIN = Decoder(_NAMES, "blk.{}.", _ENDS, turned="model.embed_tokens")
FAMILIES = {
    "llama": ("llama", _PLAIN._replace(in_pairs=True)),
    "mistral": ("llama", _PLAIN._replace(in_pairs=True)),
    "qwen2": ("qwen2", _PLAIN),
    "qwen3": ("qwen3", _PLAIN),
    "gemma": ("gemma", _PLAIN),
    "gemma2": ("gemma2", _PLAIN),
    "gemma3_text": ("gemma3", _PLAIN),
    "phi3": ("phi3", _PLAIN._replace(names=_FUSED)),
}
"""llama.cpp's architecture and names by `model_type`: models whose other matrices it keeps."""


def detects(files: Files) -> bool:
    """Whether a path is a GGUF file."""
    if not files.path.is_file():
        return False
    with files.path.open("rb") as file:
        return file.read(4) == b"GGUF"


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
    architecture, decoder = _family(facts)
    kinds = ("linear", "embedding")
    sites = plain_sites(state, "llama.cpp", kinds, dtype=dtype or "float32", alpha="one")
    for name in filter(sites.__contains__, _OUTSIDE):
        facts.refuse_tied(name, "llama.cpp")
    tensors = decoder.stored({n: (s.A, s.B) for n, s in sites.items()}, facts)
    first = next(iter(sites.values()))
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "adapter.gguf")
        writer = gguf.GGUFWriter(file, architecture)
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


def read(path: Path, facts: ModelFacts) -> AdapterState:
    """Read an adapter for llama.cpp, under transformers' names.

    The base's config gives the heads of the architecture `llama`.
    """
    fields, tensors = content(path)
    types = {key: fields.get(key) for key in ("general.type", "adapter.type")}
    if types != {"general.type": "adapter", "adapter.type": "lora"}:
        raise FormatError("", f"it says {types}", "Give a LoRA adapter, not a model")
    architecture = str(fields.get("general.architecture"))
    alpha = fields.get("adapter.lora.alpha")
    known = dict(FAMILIES.values())
    if architecture not in known:
        problem = f"its architecture is {architecture[:40]!r}"
        raise FormatError("", problem, f"Supported are {', '.join(FAMILIES)}")
    if facts.config is not None and _family(facts)[0] != architecture:
        raise FormatError("", f"its architecture is '{architecture}'", "Name its own base")
    if not isinstance(alpha, float):
        raise FormatError("", f"its 'adapter.lora.alpha' is {alpha!r}", "Fetch it again")
    decoder, remedy = known[architecture], "Norms and experts of GGUF adapters are not read"
    sites = {}
    for name, pair in decoder.read(tensors, facts, remedy).items():
        kind = "embedding" if name == decoder.turned else "linear"
        sites[name] = plain_site(name, *pair, alpha, kind)
    return AdapterState(sites)


def _family(facts: ModelFacts) -> tuple[str, Decoder]:
    others = "; for others write --to portable and use llama.cpp's convert_lora_to_gguf.py"
    return FAMILIES[facts.model_type(FAMILIES, "how llama.cpp calls its tensors", others)]


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise FormatError("", "the package gguf is missing", "Run pip install gguf") from None
    return gguf


def content(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the scalar fields and the tensors of a file, copied."""
    gguf = _library()
    try:
        reader = gguf.GGUFReader(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if name.startswith(("general.", "adapter.")) and len(field.data) == 1
        }
        stored = {t.name: (t.tensor_type.name, t.data) for t in reader.tensors}
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, RecursionError) as error:
        raise FormatError("", f"it is damaged ({error})"[:300], "Fetch it again") from error
    for name, (kind, _) in stored.items():
        if kind not in _DTYPES:
            problem = f"'{name[:200]}' is of type {kind}"
            raise FormatError("", problem, "Convert it with --outtype f32")
    return fields, {n: torch.from_numpy(d.astype(_DTYPES[k])) for n, (k, d) in stored.items()}
