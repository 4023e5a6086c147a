"""The folder of litgpt's `finetune lora`: `lit_model.pth.lora` and `hyperparameters.yaml`.

q, k and v are one layer there, `transformer.h.0.attn.qkv`, with the A and the B of the adapted ones
stacked, as in a site with slices. All sites have one rank and one alpha, a module is adapted in all
layers, and all matrices of an MLP or none. `litgpt merge_lora` needs the files of the base's folder
(model_config.yaml, tokenizer) in the same folder.

Source: litgpt 0.5.13, lora.py (`LoRAQKVLinear`), scripts/merge_lora.py,
scripts/convert_hf_checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_inject.adapter.state import AdapterState, SiteState
from lora_inject.errors import FormatError
from lora_inject.formats.base_config import Heads, heads, text_config
from lora_inject.formats.decoder_names import check_every_layer, check_whole_mlp, ours, theirs
from lora_inject.formats.pickles import pickled, read_pickle
from lora_inject.formats.plain import (
    in_dtype,
    matrices,
    one_rank_and_scale,
    plain_site,
    plain_sites,
)
from lora_inject.storage.atomic import write_directory

FILE, CONFIG = "lit_model.pth.lora", "hyperparameters.yaml"
_NAMES = {
    "lm_head": "lm_head",
    "self_attn.o_proj": "attn.proj",
    "mlp.gate_proj": "mlp.fc_1",
    "mlp.up_proj": "mlp.fc_2",
    "mlp.down_proj": "mlp.proj",
}
_LAYER, _QKV = "transformer.h.{}.", "attn.qkv"
_PARTS = {"lora_query": "q_proj", "lora_key": "k_proj", "lora_value": "v_proj"}
MODEL_TYPES = ("llama", "mistral", "gemma", "gemma2")
"""Models whose MLP and attention litgpt converts so."""


def detects(path: Path) -> bool:
    """Whether a path is such a folder."""
    return (path / FILE).is_file()


def write(
    state: AdapterState,
    path: Path,
    *,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Write an adapter as litgpt's `finetune lora` does.

    Args:
        state: The adapter: the same linear layers in every layer of a Llama-like model.
        path: The folder.
        overwrite: Replace an adapter that is there already.
        config: The base's config as plain data, for its model_type and heads.
        base_model: litgpt's folder of the base (`checkpoint_dir`).
        dtype: `float16`, `bfloat16` or `float32`; by default each tensor's own.

    Returns:
        The folder that was written.

    Raises:
        FormatError: The base is not supported, or litgpt would miss tensors.
    """
    asked = f"write litgpt adapter to '{path}'"
    sites = plain_sites(state, asked, kinds=("linear",), client="litgpt")
    sites = in_dtype(one_rank_and_scale(sites, asked), dtype, asked)
    sizes = _base(config, asked)
    check_every_layer(sites, sizes.n_layers, asked, "litgpt")
    check_whole_mlp(sites, asked, "litgpt")
    tensors: dict[str, Tensor] = {}
    for name, site in sites.items():
        if not name.endswith(tuple(_PARTS.values())):
            key = theirs(name, _NAMES, _LAYER, asked)
            tensors |= {f"{key}.lora_A": site.A, f"{key}.lora_B": site.B}
    for layer in range(sizes.n_layers):
        parts = [f"model.layers.{layer}.self_attn.{part}" for part in _PARTS.values()]
        found = [sites[name] for name in parts if name in sites]
        if found:
            key = _LAYER.format(layer) + _QKV
            tensors[f"{key}.lora_A"] = torch.cat([site.A for site in found])
            tensors[f"{key}.lora_B"] = torch.cat([site.B for site in found])
    files = {FILE: pickled(tensors, "model"), CONFIG: _said(sites, base_model)}
    return write_directory(path, files, overwrite=overwrite)


def _said(sites: Mapping[str, SiteState], base_model: str | None) -> bytes:
    """Return hyperparameters.yaml as `merge_lora` reads it."""
    import yaml

    first, ends = next(iter(sites.values())), {name.rpartition(".")[2] for name in sites}
    said = {
        "checkpoint_dir": base_model or "",
        "lora_r": first.spec.rank,
        "lora_alpha": first.scale * first.spec.rank,
        "lora_dropout": 0.0,
        **{flag: end in ends for flag, end in _PARTS.items()},
        "lora_projection": "o_proj" in ends,
        "lora_mlp": "down_proj" in ends,
        "lora_head": "lm_head" in ends,
    }
    return yaml.safe_dump(said, sort_keys=False).encode()


def read(
    path: Path, *, config: Mapping[str, Any] | None = None, allow_pickle: bool = False
) -> AdapterState:
    """Read an adapter of litgpt.

    Args:
        path: The folder.
        config: The base's config of transformers as plain data, for its heads.
        allow_pickle: Read the pickle, by torch.load(weights_only=True), which builds tensors only.

    Returns:
        The adapter, under transformers' names.

    Raises:
        FormatError: The base is not supported, pickles are not allowed, or tensors are missing or
            do not fit.
    """
    asked = f"read litgpt adapter '{path}'"
    tensors = read_pickle(path / FILE, asked, allow=allow_pickle, inside="model")
    said, sizes = _hyperparameters(path, asked), _base(config, asked)
    ends = (".lora_A", ".lora_B")
    sites = {}
    for key, (a, b) in matrices(tensors, ends, asked, "Give a LoRA of litgpt").items():
        where = f"{asked}, '{key[:200]}'"
        for name, one_a, one_b in _split(key, a, b, said, sizes, where):
            sites[name] = plain_site(name, one_a, one_b, said["lora_alpha"], where)
            if sites[name].spec.rank != said["lora_r"]:
                found = f"its rank is {sites[name].spec.rank}, {CONFIG} says {said['lora_r']}"
                raise FormatError(where, found, "The two do not belong together")
    return AdapterState(sites)


def _split(
    key: str, a: Tensor, b: Tensor, said: Mapping[str, Any], sizes: Heads, where: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the pairs of the transformers modules in one layer of litgpt."""
    if not key.endswith(f".{_QKV}"):
        yield ours(key, _NAMES, _LAYER, where), a, b
        return
    prefix = ours(key, {"self_attn": _QKV}, _LAYER, where)
    adapted = [(end, flag) for flag, end in _PARTS.items() if said.get(flag)]
    widths = [
        (sizes.n_heads if flag == "lora_query" else sizes.n_kv_heads) * sizes.head_dim
        for _, flag in adapted
    ]
    if not adapted or len(a) != len(adapted) * b.shape[1] or sum(widths) != len(b):
        found = (
            f"A has {len(a)} rows and B {len(b)}, which are not those of {[e for e, _ in adapted]}"
        )
        raise FormatError(where, found, f"Restore {CONFIG}, or name the adapter's own base")
    pieces = zip(adapted, a.chunk(len(adapted)), torch.split(b, widths), strict=True)
    for (end, _), one_a, one_b in pieces:
        yield f"{prefix}.{end}", one_a.clone(), one_b.clone()


def _hyperparameters(path: Path, asked: str) -> Mapping[str, Any]:
    """Return the contents of `hyperparameters.yaml`, as plain data."""
    import yaml

    where = f"{asked}, {CONFIG}"
    if not (path / CONFIG).is_file() or (path / CONFIG).stat().st_size > 1_000_000:
        raise FormatError(where, "the file is missing or too long", "Copy the whole folder")
    try:
        said: Any = yaml.safe_load((path / CONFIG).read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormatError(
            where, f"it is not valid YAML ({error})"[:300], "Fetch it again"
        ) from error
    found: dict[str, Any] = said if isinstance(said, dict) else {}
    for field in ("lora_r", "lora_alpha"):
        number: Any = found.get(field)
        if type(number) not in (int, float) or not 0 < number < 1e300:
            raise FormatError(where, f"{field} is {str(number)[:40]!r}", "Correct the file")
    return found


def _base(config: Mapping[str, Any] | None, asked: str) -> Heads:
    kind = text_config(config, asked, "how wide q, k and v are").get("model_type")
    if kind not in MODEL_TYPES:
        found = f"the base's model_type is {str(kind)[:40]!r}"
        raise FormatError(asked, found, f"Known are {', '.join(MODEL_TYPES)}")
    return heads(config, asked, "")
