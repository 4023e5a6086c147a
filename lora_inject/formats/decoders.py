"""Llama-like decoders under llama.cpp's names: GGUF files.

Llama's rotary embedding rotates pairs of values. Transformers stores the first values of all pairs
of a head, then the second ones; Meta's code, and programs that follow it, store each pair side by
side. So these programs have the rows of q and k, and of their B, in another order.

A GGUF file of llama.cpp has `blk.0.attn_q.weight.lora_a` (A), `.lora_b` (B) and one alpha for all.
The scale is alpha over the rank of each pair, so ranks may differ; if scales would need several
alphas, they are folded into B. The A of an embedding is transposed. Needs the package `gguf`.
Source: llama.cpp, convert_lora_to_gguf.py, conversion/llama.py (`permute`), src/llama-adapter.cpp.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_inject.core.adapter.file_keys import one_line
from lora_inject.core.adapter.state import AdapterState
from lora_inject.errors import FormatError, within
from lora_inject.formats.format import Files
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.pairs import matrices, plain_site, plain_sites

_OUTSIDE = ("model.embed_tokens", "lm_head")
# Transformers' name of a module, in its layer or outside of layers; llama.cpp's for most models,
# and for those that fuse projections.
# fmt: off
_NAMES = {
    "model.embed_tokens":   ("token_embd",  "token_embd"),
    "lm_head":              ("output",      "output"),
    "self_attn.q_proj":     ("attn_q",      None),
    "self_attn.k_proj":     ("attn_k",      None),
    "self_attn.v_proj":     ("attn_v",      None),
    "self_attn.qkv_proj":   (None,          "attn_qkv"),
    "self_attn.o_proj":     ("attn_output", "attn_output"),
    "mlp.gate_up_proj":     (None,          "ffn_up"),
    "mlp.gate_proj":        ("ffn_gate",    None),
    "mlp.up_proj":          ("ffn_up",      None),
    "mlp.down_proj":        ("ffn_down",    "ffn_down"),
}
# fmt: on
_LAYER = re.compile(r"model\.layers\.(\d{1,4})\.(.+)")
Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""A and B by transformers' name of their module."""


def in_pairs(rows: Tensor, n_heads: int, *, back: bool = False) -> Tensor:
    """Return rows `(n, r)` of transformers in the order of Meta's code; `back` is the inverse.

    Examples:
        >>> rows = in_pairs(torch.arange(4)[:, None], 1)
        >>> rows.flatten().tolist(), in_pairs(rows, 1, back=True).flatten().tolist()
        ([0, 2, 1, 3], [0, 1, 2, 3])
    """
    halves = (-1, 2) if back else (2, -1)
    return rows.reshape(n_heads, *halves, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


class Decoder(NamedTuple):
    """A program's keys of the A and B of a decoder's modules.

    Attributes:
        column: Where `_NAMES` has the program's names.
        layer: The program's prefix of a layer, such as `blk.{}.`.
        ends: The ends of the program's keys of A and B.
        in_pairs: Whether the rows of q and k are in the order of Meta's code.
        turned: The module whose A is stored transposed, if any.
    """

    column: int
    layer: str
    ends: tuple[str, str]
    in_pairs: bool = False
    turned: str | None = None

    def stored(self, pairs: Pairs, facts: ModelFacts) -> dict[str, Tensor]:
        """Return the tensors of a file; the base's config says how many heads q and k have."""
        tensors = {}
        for name, (a, b) in pairs.items():
            with within(f"site '{name}'"):
                key, n_heads = self.theirs(name), self._n_heads(name, facts, len(b))
            tensors[key + self.ends[0]] = a.T if name == self.turned else a
            tensors[key + self.ends[1]] = in_pairs(b, n_heads) if n_heads else b
        return tensors

    def read(
        self, tensors: Mapping[str, Tensor], facts: ModelFacts, remedy: str
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the pairs of a file by transformers' names; `remedy` is for any other tensor."""
        pairs = {}
        for key, (a, b) in matrices(tensors, self.ends, remedy).items():
            with within(f"'{key[:200]}'"):
                name = self.ours(key)
                n_heads = self._n_heads(name, facts, len(b))
            rows = in_pairs(b, n_heads, back=True) if n_heads else b
            pairs[name] = (a.T.contiguous() if name == self.turned else a), rows
        return pairs

    @property
    def names(self) -> dict[str, str]:
        """The program's names by those of transformers."""
        return {ours: theirs for ours, of in _NAMES.items() if (theirs := of[self.column])}

    def theirs(self, name: str) -> str:
        """Return the program's name of a module."""
        match, part, names = _LAYER.fullmatch(name), part_of(name), self.names
        if part not in names:
            remedy = f"It names {one_line(names, 12)}; merge the adapter into its base instead"
            raise FormatError("", "the format has no name for this module", remedy)
        return (self.layer.format(match[1]) if match else "") + names[part]

    def ours(self, key: str) -> str:
        """Return transformers' name of a module of the program."""
        names = {theirs: mine for mine, theirs in self.names.items()}
        layer = re.escape(self.layer).replace(re.escape("{}"), r"(\d{1,4})")
        match = re.fullmatch(layer + "(.+)", key)
        part = key if match is None else match[2]
        if part not in names:
            raise FormatError("", "this module is not known", "Give an adapter of such a model")
        return (f"model.layers.{match[1]}." if match else "") + names[part]

    def _n_heads(self, name: str, facts: ModelFacts, n_rows: int) -> int:
        """Return the number of heads of q or k if their rows are in pairs, else 0."""
        part = part_of(name)
        if not self.in_pairs or part not in ("self_attn.q_proj", "self_attn.k_proj"):
            return 0
        sizes = facts.heads("how many heads q and k have")
        n_heads = sizes.n_heads if part == "self_attn.q_proj" else sizes.n_kv_heads
        if n_rows != n_heads * sizes.head_dim or sizes.head_dim % 2:
            problem = f"B has {n_rows} rows, and the base has {n_heads} heads of {sizes.head_dim}"
            raise FormatError("", problem, "Name the base that the adapter was made for")
        return n_heads


def part_of(name: str) -> str:
    """Return a module's name within its layer.

    Examples:
        >>> part_of("model.layers.3.self_attn.q_proj"), part_of("lm_head")
        ('self_attn.q_proj', 'lm_head')
    """
    match = _LAYER.fullmatch(name)
    return name if match is None else match[2]


# llama.cpp ---------------------------------------------------------------------------------------

_DTYPES = {"F32": "float32", "F16": "float16"}
_PLAIN = Decoder(0, "blk.{}.", (".weight.lora_a", ".weight.lora_b"), turned="model.embed_tokens")
FAMILIES = {
    "llama": ("llama", _PLAIN._replace(in_pairs=True)),
    "mistral": ("llama", _PLAIN._replace(in_pairs=True)),
    "qwen2": ("qwen2", _PLAIN),
    "qwen3": ("qwen3", _PLAIN),
    "gemma": ("gemma", _PLAIN),
    "gemma2": ("gemma2", _PLAIN),
    "gemma3_text": ("gemma3", _PLAIN),
    "phi3": ("phi3", _PLAIN._replace(column=1)),
}
"""llama.cpp's architecture and names by `model_type`: models whose other matrices it keeps."""


def is_gguf(files: Files) -> bool:
    """Whether a path is a GGUF file."""
    if not files.path.is_file():
        return False
    with files.path.open("rb") as file:
        return file.read(4) == b"GGUF"


def write_gguf(
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


def read_gguf(path: Path, facts: ModelFacts) -> AdapterState:
    """Read an adapter for llama.cpp, under transformers' names.

    The base's config gives the heads of the architecture `llama`.
    """
    fields, tensors = gguf_content(path)
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


def gguf_content(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
