"""The files of diffusers' pipelines: `pytorch_lora_weights.safetensors`.

Keys are PEFT's under the name of a component: `unet.NAME.lora_A.weight`. Scales are not
tensors: diffusers reads them from the header's `lora_adapter_metadata`, with default 1; ComfyUI
always uses 1. So `write` folds scales into B. `read` accepts older names as diffusers does:
`.lora.down.weight`, `.lora_linear_layer.down.weight`, and `.processor.to_q_lora.down.weight` of
attention processors. Files of a single model (`save_lora_adapter`) name no component.

Source: diffusers 0.42.1, loaders/peft.py (`load_lora_adapter`), loaders/lora_base.py
(`pack_weights`), utils/state_dict_utils.py; ComfyUI, comfy/lora.py (generic names under
`diffusion_model.` and `text_encoders.`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_inject.adapter.state import AdapterState
from lora_inject.errors import FormatError
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.peft.adapter_config import Claims, read_claims
from lora_inject.formats.peft.tensor_layout import pack
from lora_inject.formats.plain import (
    check_component,
    check_shapes,
    one_component,
    pairs_of,
    plain_site,
    plain_sites,
)
from lora_inject.storage.atomic import write_directory, write_file
from lora_inject.storage.strict_json import parse_json
from lora_inject.storage.tensors import read_names, read_tensors, serialize

FILE = "pytorch_lora_weights.safetensors"
COMPONENTS = (
    *("unet", "transformer", "transformer_2", "prior", "decoder", "diffusion_model"),
    *("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoders"),
)
_METADATA = "lora_adapter_metadata"
_KEY = re.compile(
    rf"(?:({'|'.join(COMPONENTS)})\.)?(.+?)"
    r"(?:\.lora_([AB])|\.lora(?:_linear_layer)?\.(down|up)|(_lora)\.(down|up)|\.(alpha))(\.weight)?"
)


def detects(path: Path) -> bool:
    """Whether a path is such a file, by its keys, or a folder that holds one."""
    file = path / FILE if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        return False
    found = [_KEY.fullmatch(key) for key in read_names(file)[0]]
    return any(match and (match[1] or file.name == FILE) for match in found)


def write(
    state: AdapterState,
    path: Path,
    _facts: ModelFacts,
    *,
    overwrite: bool = False,
    component: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Write an adapter of linear layers and convolutions of one component of a pipeline.

    `component` is the adapted model's name in the pipeline, such as `unet`, `transformer` or
    `text_encoder`; `diffusion_model` for ComfyUI. The path is a folder or a `.safetensors` file.
    """
    asked = f"write diffusers adapter to '{path}'"
    check_component(component, COMPONENTS, asked)
    client, kinds = "a pipeline of diffusers", ("linear", "conv")
    sites = plain_sites(state, asked, client, kinds, dtype=dtype, alpha="rank")
    tensors: dict[str, Tensor] = {}
    for name, site in sites.items():
        a, b = pack(site)
        tensors |= {f"{component}.{name}.lora_{role}.weight": t for role, t in (("A", a), ("B", b))}
    content = serialize(tensors, {"format": "pt"})
    if path.suffix == ".safetensors":
        return write_file(path, content, overwrite=overwrite)
    return write_directory(path, {FILE: content}, overwrite=overwrite)


def read(
    path: Path, _facts: ModelFacts, *, component: str | None = None, on_disk: bool = False
) -> AdapterState:
    """Read the adapter of one component; name the component if the file holds several."""
    asked = f"read diffusers adapter '{path}'"
    tensors, said = read_tensors(path / FILE if path.is_dir() else path, on_disk=on_disk)
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise FormatError(
                asked,
                f"the tensor '{key[:200]}' is not known",
                "Give a LoRA of a pipeline; other variants are merged by diffusers (fuse_lora)",
            )
        side = next(filter(None, (match[3], match[4], match[6], match[7])))
        role = {"down": "A", "up": "B"}.get(side, side)
        place = found.setdefault(match[1] or "", {}).setdefault(
            _module(match[2], bool(match[5])), {}
        )
        if role in place:
            raise FormatError(
                f"{asked}, '{key[:200]}'", "its site has this tensor twice", "Fetch it again"
            )
        place[role] = tensor
    component, chosen = one_component(found, component, asked)
    pairs = pairs_of(chosen, "A", "B", asked)
    claims = _claims(said, f"{component}." if component else "", asked)
    numbers = None if claims is None else claims.numbers(pairs)
    sites = {}
    for name, (a, b) in pairs.items():
        where = f"{asked}, site '{name[:200]}'"
        check_shapes(a, b, where)
        alpha: Tensor | float | None = chosen[name].get("alpha")
        if claims is not None and numbers is not None:
            alpha = claims.scale(numbers[name][1], len(a)) * len(a)
        sites[name] = plain_site(name, a, b, alpha, where)
    return AdapterState(sites)


def _module(path: str, old: bool) -> str:
    """Return the module of a path; attention processors used to hold the LoRA of their layers."""
    name = path.replace(".processor.", ".") if old else path
    return f"{name}.0" if old and name.endswith(".to_out") else name


def _claims(said: Mapping[str, str], prefix: str, asked: str) -> Claims | None:
    """Return the header's config of a component, None if there is none."""
    if _METADATA not in said:
        return None
    where = f"{asked}, metadata '{_METADATA}'"
    config: Any = parse_json(said[_METADATA], where)
    if not isinstance(config, dict):
        raise FormatError(where, "it is not a table of fields", "Fetch the file again")
    mine = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
    return read_claims({"peft_type": "LORA", **mine}, where) if mine else None
