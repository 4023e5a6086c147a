"""The folder of torchtune's adapter checkpoints: `adapter_model.pt` and `adapter_config.json`.

Names are torchtune's (`layers.0.attn.q_proj.lora_a.weight`), and the rows of B of q and k have the
order of Meta's code if torchtune permutes them. All sites have one rank and one alpha, a module is
adapted in all layers, and all matrices of an MLP or none. A folder that also has
`adapter_model.safetensors`, as torchtune writes for models of transformers, is PEFT's.

Source: torchtune 0.6.1, models/convert_weights.py (`tune_to_peft_adapter_weights`, `_FROM_HF`),
training/checkpointing/_checkpointer.py, modules/peft/_utils.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_inject.adapter.state import AdapterState
from lora_inject.errors import FormatError
from lora_inject.formats.base_config import Heads, heads, text_config
from lora_inject.formats.decoder_names import (
    check_every_layer,
    check_whole_mlp,
    from_pairs,
    heads_of,
    ours,
    theirs,
    to_pairs,
)
from lora_inject.formats.pickles import pickled, read_pickle
from lora_inject.formats.plain import (
    in_dtype,
    matrices,
    one_rank_and_scale,
    plain_site,
    plain_sites,
)
from lora_inject.storage.atomic import write_directory
from lora_inject.storage.strict_json import parse_json

FILES, CONFIG = ("adapter_model.pt", "adapter_0.pt"), "adapter_config.json"
_NAMES = {
    "lm_head": "output",
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}
_LAYER = "layers.{}."
IN_PAIRS = {"llama": True, "mistral": True, "qwen2": False}
"""By `model_type`: whether torchtune's rows of q and k are in pairs."""


def detects(path: Path) -> bool:
    """Whether a path is such a folder."""
    return _file(path) is not None and not (path / "adapter_model.safetensors").exists()


def _file(path: Path) -> Path | None:
    return next((path / name for name in FILES if (path / name).is_file()), None)


def write(
    state: AdapterState,
    path: Path,
    *,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> Path:
    """Write an adapter as torchtune's `adapter_checkpoint`.

    Args:
        state: The adapter: the same linear layers in every layer of a Llama, Mistral or Qwen2.
        path: The folder.
        overwrite: Replace an adapter that is there already.
        config: The base's config as plain data, for its kind and heads.
        dtype: `float16`, `bfloat16` or `float32`; by default each tensor's own.

    Returns:
        The folder that was written. Its adapter_config.json states the rank and the alpha to set in
        the recipe's config.

    Raises:
        FormatError: The base is not supported, or torchtune would miss tensors.
    """
    asked = f"write torchtune adapter to '{path}'"
    sites = plain_sites(state, asked, kinds=("linear",), client="torchtune")
    sites = in_dtype(one_rank_and_scale(sites, asked), dtype, asked)
    paired, sizes = _base(config, asked)
    check_every_layer(sites, sizes.n_layers, asked, "torchtune")
    check_whole_mlp(sites, asked, "torchtune")
    tensors: dict[str, Tensor] = {}
    for name, site in sites.items():
        key = theirs(name, _NAMES, _LAYER, asked)
        n_heads = heads_of(name, sizes, len(site.B), asked)
        rows = to_pairs(site.B, n_heads) if paired and n_heads else site.B
        tensors |= {f"{key}.lora_a.weight": site.A, f"{key}.lora_b.weight": rows}
    first = next(iter(sites.values()))
    said = {
        "r": first.spec.rank,
        "lora_alpha": first.scale * first.spec.rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in sites}),
        "peft_type": "LORA",
    }
    files = {FILES[0]: pickled(tensors), CONFIG: (json.dumps(said, indent=2) + "\n").encode()}
    return write_directory(path, files, overwrite=overwrite, replaceable=FILES)


def read(
    path: Path,
    *,
    config: Mapping[str, Any] | None = None,
    alpha: float | None = None,
    allow_pickle: bool = False,
) -> AdapterState:
    """Read an adapter checkpoint of torchtune.

    Args:
        path: The folder.
        config: The base's config as plain data, for its kind and heads.
        alpha: The recipe's `lora_alpha`, needed without an adapter_config.json.
        allow_pickle: Read the pickle, by torch.load(weights_only=True), which builds tensors only.

    Returns:
        The adapter, under transformers' names.

    Raises:
        FormatError: The base is not supported, alpha is not known, pickles are not allowed, or
            tensors are missing or do not fit.
    """
    asked = f"read torchtune adapter '{path}'"
    file = _file(path)
    if file is None:
        raise FormatError(asked, f"there is no {FILES[0]} in it", "Give the folder of an epoch")
    tensors = read_pickle(file, asked, allow=allow_pickle)
    alpha = _alpha(path, alpha, asked)
    paired, sizes = _base(config, asked)
    ends = (".lora_a.weight", ".lora_b.weight")
    remedy = "DoRA and modules of several parts are not read"
    sites = {}
    for key, (a, b) in matrices(tensors, ends, asked, remedy).items():
        where = f"{asked}, '{key[:200]}'"
        name = ours(key, _NAMES, _LAYER, where)
        n_heads = heads_of(name, sizes, len(b), where)
        rows = from_pairs(b, n_heads) if paired and n_heads else b
        sites[name] = plain_site(name, a, rows, alpha, where)
    return AdapterState(sites)


def _alpha(path: Path, given: float | None, asked: str) -> float:
    """Return the one alpha: the caller's, or that of adapter_config.json."""
    if given is None and (path / CONFIG).is_file():
        said: Any = parse_json((path / CONFIG).read_bytes(), f"{asked}, {CONFIG}")
        given = said.get("lora_alpha") if isinstance(said, dict) else None
    if given is None or type(given) not in (int, float):
        found = f"no {CONFIG} says its alpha"
        raise FormatError(asked, found, "Pass alpha=..., the recipe's lora_alpha")
    return float(given)


def _base(config: Mapping[str, Any] | None, asked: str) -> tuple[bool, Heads]:
    kind = text_config(config, asked, "the order of the rows of q and k").get("model_type")
    if kind not in IN_PAIRS:
        raise FormatError(
            asked,
            f"the base's model_type is {str(kind)[:40]!r}",
            f"Known are {', '.join(IN_PAIRS)}; for others torchtune writes PEFT folders",
        )
    return IN_PAIRS[kind], heads(config, asked, "")
