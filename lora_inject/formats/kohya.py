"""One file of kohya's sd-scripts, which LyCORIS (LoCon) and ComfyUI also read and write.

Each module has `lora_unet_NAME.lora_down.weight` (A), `.lora_up.weight` (B) and the scalar
`.alpha`. The scale is alpha over the rank of the tensors; without alpha it is 1. NAME is the
module's name with `_` for each dot. This is ambiguous, so NAME is looked up among the names of the
model or of the base's files. A file written here also has the names in its metadata.

Source: kohya-ss/sd-scripts, networks/lora.py (`LoRAModule`, `create_network_from_weights`);
ComfyUI, comfy/lora.py and comfy/weight_adapter/lora.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_inject.core.adapter.file_keys import check_no_clash, one_line
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.strict_json import parse_json
from lora_inject.core.files.tensors import read_tensors, serialize
from lora_inject.core.spec.names import nearest
from lora_inject.errors import FormatError, within
from lora_inject.formats.format import Files
from lora_inject.formats.model_facts import CONVERT, ModelFacts
from lora_inject.formats.pairs import plain_site
from lora_inject.formats.peft.tensor_layout import pack
from lora_inject.formats.plain import check_component, in_component, name_in_files, plain_sites

COMPONENTS = ("unet", "te", "te1", "te2", "te3", "transformer")
_KEY = re.compile(r"((?:lora|lycoris)_[^.]+)\.(lora_down\.weight|lora_up\.weight|alpha)")
_PREFIX = re.compile(rf"(?:lora_({'|'.join(COMPONENTS)})|(lycoris))_(.+)")
_ROLES = {"lora_down.weight": "A", "lora_up.weight": "B"}
_NAMES = "lora_inject.names"


def detects(files: Files) -> bool:
    """Whether a path is such a file, by its keys."""
    return any(map(_KEY.fullmatch, files.tensor_names()))


def write(
    state: AdapterState,
    _path: Path,
    _facts: ModelFacts,
    *,
    component: str | None = None,
    dtype: str | None = None,
) -> bytes:
    """Write an adapter of linear layers and convolutions of one component of a pipeline.

    `component` says which: `unet`, `te` (text encoder), `te1` and `te2` (of SDXL), `te3`,
    `transformer` (Flux and SD3, for ComfyUI too). Alphas are float32.
    """
    part = check_component(component, COMPONENTS)
    sites = plain_sites(state, "a file of kohya's", ("linear", "conv"), dtype=dtype)
    keys = {name: name_in_files(name, part) for name in sites}
    flat = {name: f"lora_{part}_{key.replace('.', '_')}" for name, key in keys.items()}
    check_no_clash(flat.values())
    tensors: dict[str, Tensor] = {}
    for name, site in sites.items():
        down, up = pack(site)
        alpha = torch.tensor(site.scale * site.spec.rank, dtype=torch.float32, device="cpu")
        of_site = {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}
        tensors |= {f"{flat[name]}.{end}": tensor for end, tensor in of_site.items()}
    names = json.dumps({flat[name]: name for name in sites})
    said = {"format": "pt", "ss_network_module": "networks.lora", _NAMES: names}
    return serialize(tensors, said)


def read(path: Path, facts: ModelFacts, *, component: str | None = None) -> AdapterState:
    """Read the adapter of one component; name the component if the file holds several.

    The model's module names are not needed for a file that was written here.
    """
    tensors, said = read_tensors(path)
    prefix, modules = in_component(tensors, _parsed, component)
    start = prefix if prefix == "lycoris" else f"lora_{prefix}"
    names = _names_in(said)
    known: dict[str, list[str]] = {}
    for module in facts.module_names or ():
        known.setdefault(module.replace(".", "_"), []).append(module)
    by_flat = None if facts.module_names is None else known
    sites = {}
    for flat, pair in modules.items():
        with within(f"site '{start}_{flat[:200]}'"):
            name = names.get(f"{start}_{flat}") or _unflattened(flat, by_flat)
            if name in sites:
                raise FormatError("", f"the file holds '{name}' twice", "Fetch it again")
        sites[name] = plain_site(name, *pair)
    return AdapterState(sites)


def _parsed(key: str) -> tuple[str, str, str]:
    """Return the component, the flat name of the module and the role of a tensor."""
    match = _KEY.fullmatch(key)
    if match is None:
        problem = (
            f"'{key[:200]}' is not of a LoRA: LoHa, LoKr, DoRA, Tucker and others are not read"
        )
        remedy = "Merge it into the base with the program that made it, and extract a LoRA"
        raise FormatError("", problem, f"{remedy} (lora-inject extract)")
    prefix = _PREFIX.fullmatch(match[1])
    if prefix is None:
        problem = f"'{match[1][:200]}' does not begin with a component"
        raise FormatError("", problem, f"Known are lora_{', lora_'.join(COMPONENTS)} and lycoris")
    return prefix[1] or prefix[2], prefix[3], _ROLES.get(match[2], match[2])


def _names_in(said: Mapping[str, str]) -> dict[str, str]:
    """Return names by their form in the file, from the metadata; those that do not fit are none."""
    names: Any = parse_json(said.get(_NAMES, "{}"), f"metadata '{_NAMES}'")
    items = names.items() if isinstance(names, dict) else ()
    return {flat: name for flat, name in items if flat.endswith(f"_{name}".replace(".", "_"))}


def _unflattened(flat: str, known: Mapping[str, Sequence[str]] | None) -> str:
    """Return the one module of `known`, by names with `_` for dots, that a flat name means."""
    if known is None:
        problem = "dots of names are written as '_', so the file alone does not give the names"
        remedy = f"{CONVERT} (in Python, load it onto the model, or pass module_names=)"
        raise FormatError("", problem, remedy)
    names = known.get(flat) or known.get(flat.removeprefix("text_model_"), ())
    if len(names) > 1:
        raise FormatError("", f"it can mean any of {one_line(names)}", "Rename one of them")
    if not names:
        near = one_line(nearest(flat, known)) or "none"
        others = "Files for SDXL and for other programs name modules in their own way"
        raise FormatError("", "the model has no such module", f"Nearest: {near}. {others}")
    return names[0]
