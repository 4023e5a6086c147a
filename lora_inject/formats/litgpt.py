"""The folder of litgpt's `finetune lora`: `lit_model.pth.lora` and `hyperparameters.yaml`.

litgpt has q, k and v as one layer, `transformer.h.0.attn.qkv`, with the A and the B of the adapted
ones stacked, as in a site with slices. All sites have one rank and one alpha. A module is adapted
in all layers or none, and so are the matrices of an MLP together. `litgpt merge_lora` needs the
files of the base's folder (model_config.yaml, tokenizer) in the same folder.

Source: litgpt 0.5.13, lora.py (`LoRAQKVLinear`), scripts/merge_lora.py,
scripts/convert_hf_checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.strict_json import is_positive
from lora_inject.core.spec.names import leaf
from lora_inject.errors import FormatError
from lora_inject.formats.decoder_names import Decoder, Pairs, check_whole
from lora_inject.formats.format import Files
from lora_inject.formats.model_facts import Heads, ModelFacts
from lora_inject.formats.pairs import plain_site, plain_sites
from lora_inject.formats.pickles import pickled, read_pickle

FILE, CONFIG = "lit_model.pth.lora", "hyperparameters.yaml"
_PARTS = {"lora_query": "q_proj", "lora_key": "k_proj", "lora_value": "v_proj"}
_QKV = "|".join(_PARTS.values())  # the three of a layer; no module has this name
_NAMES = {
    "lm_head": "lm_head",
    f"self_attn.{_QKV}": "attn.qkv",
    "self_attn.o_proj": "attn.proj",
    "mlp.gate_proj": "mlp.fc_1",
    "mlp.up_proj": "mlp.fc_2",
    "mlp.down_proj": "mlp.proj",
}
_DECODER = Decoder(_NAMES, "transformer.h.{}.", (".lora_A", ".lora_B"))
MODEL_TYPES = ("llama", "mistral", "gemma", "gemma2")
"""Models whose MLP and attention litgpt converts so."""


def detects(files: Files) -> bool:
    """Whether a path is such a folder, or its pickle, which is known by its name."""
    return files.has(FILE) or files.path.name == FILE


def write(
    state: AdapterState, _path: Path, facts: ModelFacts, *, dtype: str | None = None
) -> dict[str, bytes]:
    """Write an adapter of linear layers as litgpt's `finetune lora` does.

    The base's config gives its model_type and heads; `base_model` is litgpt's folder of the base.
    """
    kinds = ("linear",)
    sites = plain_sites(state, "litgpt", kinds, dtype=dtype, one_rank=True, alpha="one")
    sizes = _base(facts)
    check_whole(sites, sizes.n_layers, "litgpt")
    pairs = _fused({n: (s.A, s.B) for n, s in sites.items()}, sizes)
    first, ends = next(iter(sites.values())), {leaf(name) for name in sites}
    said = {
        "checkpoint_dir": facts.base_model or "",
        "lora_r": first.spec.rank,
        "lora_alpha": first.scale * first.spec.rank,
        "lora_dropout": 0.0,
        **{flag: end in ends for flag, end in _PARTS.items()},
        "lora_projection": "o_proj" in ends,
        "lora_mlp": "down_proj" in ends,
        "lora_head": "lm_head" in ends,
    }
    text = yaml.safe_dump(said, sort_keys=False)  # as `merge_lora` reads it
    return {FILE: pickled(_DECODER.stored(pairs, facts), "model"), CONFIG: text.encode()}


def _fused(pairs: Pairs, sizes: Heads) -> Pairs:
    """Stack q, k and v of each layer, in this order."""
    fused = dict(pairs)
    several: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for end in _PARTS.values():
        for name, (_, b) in pairs.items():
            if name.endswith(f"self_attn.{end}"):
                if len(b) != _width(end, sizes):
                    what = f"B has {len(b)} rows, and the base's {end} {_width(end, sizes)}"
                    remedy = "Name the base that the adapter was made for"
                    raise FormatError(f"site '{name}'", what, remedy)
                several.setdefault(name.removesuffix(end) + _QKV, []).append(fused.pop(name))
    for name, parts in several.items():
        A, B = zip(*parts, strict=True)
        fused[name] = torch.cat(A), torch.cat(B)
    return fused


def _width(end: str, sizes: Heads) -> int:
    return (sizes.n_heads if end == "q_proj" else sizes.n_kv_heads) * sizes.head_dim


def read(path: Path, facts: ModelFacts, *, allow_pickle: bool = False) -> AdapterState:
    """Read an adapter of litgpt, under transformers' names.

    The base's config, in transformers' form, gives its heads. `allow_pickle` is as in
    `pickles.read_pickle`.
    """
    said = _hyperparameters(path / CONFIG)
    tensors = read_pickle(path / FILE, allow=allow_pickle, inside="model")
    sizes = _base(facts)
    sites = {}
    for fused, pair in _DECODER.read(tensors, facts, "Give a LoRA of litgpt").items():
        for name, a, b in _split(fused, *pair, said, sizes):
            sites[name] = plain_site(name, a, b, said["lora_alpha"])
            if len(a) != said["lora_r"]:
                problem = f"its rank is {len(a)}, {CONFIG} says {said['lora_r']}"
                raise FormatError(f"site '{name}'", problem, "The two do not belong together")
    return AdapterState(sites)


def _split(
    name: str, a: Tensor, b: Tensor, said: Mapping[str, Any], sizes: Heads
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the pairs of q, k and v in their fused layer; those of another as they are."""
    if not name.endswith(_QKV):
        yield name, a, b
        return
    adapted = [end for flag, end in _PARTS.items() if said.get(flag)]
    widths = [_width(end, sizes) for end in adapted]
    if not adapted or len(a) != len(adapted) * b.shape[1] or sum(widths) != len(b):
        problem = f"A has {len(a)} rows and B {len(b)}, which are not those of {adapted}"
        remedy = f"Restore {CONFIG}, or name the adapter's own base"
        raise FormatError(f"'{name[:200]}'", problem, remedy)
    pieces = zip(adapted, a.chunk(len(adapted)), torch.split(b, widths), strict=True)
    for end, one_a, one_b in pieces:
        yield name.removesuffix(_QKV) + end, one_a.clone(), one_b.clone()


def _hyperparameters(file: Path) -> Mapping[str, Any]:
    """Return the contents of `hyperparameters.yaml`, as plain data."""
    if not file.is_file():
        remedy = "It holds the rank and the alpha; give a folder that has it"
        raise FormatError(CONFIG, "there is no such file", remedy)
    try:
        said: Any = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = f"it is not valid YAML ({error})"[:300]
        raise FormatError(CONFIG, problem, "Fetch it again") from error
    fields: dict[str, Any] = said if isinstance(said, dict) else {}
    for field in ("lora_r", "lora_alpha"):
        if not is_positive(number := fields.get(field)):
            raise FormatError(CONFIG, f"{field} is {str(number)[:40]!r}", "Correct the file")
    return fields


def _base(facts: ModelFacts) -> Heads:
    facts.model_type(MODEL_TYPES, "how wide q, k and v are")
    return facts.heads("")
