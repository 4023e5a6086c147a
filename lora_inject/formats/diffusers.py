"""The files of diffusers' pipelines: `pytorch_lora_weights.safetensors`.

Keys are PEFT's under the name of a component: `unet.NAME.lora_A.weight`. Scales are not
tensors: diffusers reads them from the header's `lora_adapter_metadata`, with default 1; ComfyUI
always takes 1. So scales are folded into B on writing. Older names are read as in diffusers:
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
from lora_inject.formats.peft.adapter_config import Claims, read_claims
from lora_inject.formats.peft.tensor_layout import pack
from lora_inject.formats.plain import (
    alpha_of,
    check_component,
    check_finite,
    dtype_named,
    one_component,
    pairs_of,
    plain_site,
    plain_sites,
    with_scale_one,
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
    *,
    overwrite: bool = False,
    component: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Write an adapter of one component of a pipeline.

    Args:
        state: The adapter: linear layers and convolutions, nothing trained in full.
        path: A folder, or a file that ends in `.safetensors`.
        overwrite: Replace what is there already.
        component: Name of the adapted model in the pipeline, such as `unet`, `transformer` or
            `text_encoder`; `diffusion_model` for ComfyUI.
        dtype: `float16`, `bfloat16` or `float32`; by default each tensor's own.

    Returns:
        What was written.

    Raises:
        FormatError: The component is not named, or such a file cannot express something.
    """
    asked = f"write diffusers adapter to '{path}'"
    check_component(component, COMPONENTS, asked)
    sites = plain_sites(state, asked, kinds=("linear", "conv"), client="a pipeline of diffusers")
    sites = with_scale_one(sites, dtype=dtype_named(dtype, asked))
    check_finite(sites, asked)
    tensors: dict[str, Tensor] = {}
    for name, site in sites.items():
        a, b = pack(site)
        tensors |= {f"{component}.{name}.lora_{role}.weight": t for role, t in (("A", a), ("B", b))}
    content = serialize(tensors, {"format": "pt"})
    if path.suffix == ".safetensors":
        return write_file(path, content, overwrite=overwrite)
    return write_directory(path, {FILE: content}, overwrite=overwrite)


def read(path: Path, *, component: str | None = None, on_disk: bool = False) -> AdapterState:
    """Read the adapter of one component.

    Args:
        path: The file, or the folder that holds `pytorch_lora_weights.safetensors`.
        component: Which component to read where the file holds several.
        on_disk: Leave the values in the file until they are used.

    Returns:
        The adapter.

    Raises:
        FormatError: No component is named and there are several, or tensors are missing or do not
            fit.
    """
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
        place = found.setdefault(match[1], {}).setdefault(_module(match[2], bool(match[5])), {})
        if role in place:
            raise FormatError(
                f"{asked}, '{key[:200]}'", "its site has this tensor twice", "Fetch it again"
            )
        place[role] = tensor
    chosen = one_component(found, component, asked)
    component = next(name for name, of in found.items() if of is chosen)
    pairs, others = pairs_of(chosen, "A", "B", asked)
    claims = _claims(said, f"{component}." if component else "", asked)
    scales = _scales(claims, pairs)
    sites = {}
    for name, (a, b) in pairs.items():
        where = f"{asked}, site '{name[:200]}'"
        alpha = alpha_of(others[name].get("alpha"), len(a), where)
        if name in scales:
            alpha = scales[name] * len(a)
        sites[name] = plain_site(name, a, b, alpha, where)
    return AdapterState(sites)


def _module(path: str, old: bool) -> str:
    """Return the module of a path; attention processors formerly held the LoRA of their layers."""
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


def _scales(claims: Claims | None, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return the scale of each site that the header's config states."""
    if claims is None:
        return {}
    numbers = claims.numbers(pairs)
    return {name: claims.scale(numbers[name][1], len(a)) for name, (a, _) in pairs.items()}
