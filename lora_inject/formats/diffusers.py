"""The files of diffusers' pipelines: `pytorch_lora_weights.safetensors`.

Keys are PEFT's under the name of a component: `unet.NAME.lora_A.weight`. Scales are not
tensors: diffusers reads them from the header's `lora_adapter_metadata`, with default 1; ComfyUI
always uses 1. So `write` folds scales into B. `read` accepts older names as diffusers does:
`.lora.down.weight`, `.lora_linear_layer.down.weight`, and `.processor.to_q_lora.down.weight` of
attention processors.

Files of a single model (`save_lora_adapter`) name no component: their keys are the names of its
modules, of which the first may be a component's (the `decoder` of an autoencoder). The names of the
model tell, and `component=""` reads such a file whole.

Source: diffusers 0.42.1, loaders/peft.py (`load_lora_adapter`), loaders/lora_base.py
(`pack_weights`), utils/state_dict_utils.py; ComfyUI, comfy/lora.py (generic names under
`diffusion_model.` and `text_encoders.`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.strict_json import parse_json
from lora_inject.core.files.tensors import read_tensors, serialize
from lora_inject.core.spec.names import joined
from lora_inject.errors import FormatError
from lora_inject.formats.format import Files
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.pairs import plain_site
from lora_inject.formats.peft.fields import LoraFields, read_fields
from lora_inject.formats.peft.folder import CONFIG_KEY, refuse_unfit_sites
from lora_inject.formats.peft.tensor_layout import PREFIX, pack
from lora_inject.formats.plain import check_component, in_component, name_in_files, plain_sites

FILE = "pytorch_lora_weights.safetensors"
COMPONENTS = (
    *("unet", "transformer", "transformer_2", "prior", "decoder", "diffusion_model"),
    *("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoders"),
)
_KEY = re.compile(
    rf"(?:({'|'.join(COMPONENTS)})\.)?(.+?)"
    r"(?:\.lora_([AB])|\.lora(?:_linear_layer)?\.(down|up)|(_lora)\.(down|up)|\.(alpha))(\.weight)?"
)


def file_of(path: Path) -> Path:
    """Return the file that a path names, or the one in the folder."""
    return path / FILE if path.is_dir() else path


def detects(files: Files) -> bool:
    """Whether a path is such a file, by its keys, or a folder that holds one."""
    in_folder = files.has(FILE)
    matches = [_KEY.fullmatch(key) for key in files.tensor_names(FILE if in_folder else "")]
    is_named = in_folder or files.path.name == FILE
    if any(match and (match[1] or is_named) for match in matches):
        return True
    of_one_model = [match and match[8] and not match[2].startswith(PREFIX) for match in matches]
    return bool(matches) and all(of_one_model)


def write(
    state: AdapterState,
    path: Path,
    facts: ModelFacts,
    *,
    component: str | None = None,
    dtype: str | None = None,
) -> bytes | dict[str, bytes]:
    """Write an adapter of linear layers and convolutions of one component of a pipeline.

    `component` is the adapted model's name in the pipeline, such as `unet`, `transformer` or
    `text_encoder`; `diffusion_model` for ComfyUI; `""` for a file of that model alone, which its
    `load_lora_adapter(prefix=None)` reads. The path is a folder or a `.safetensors` file.
    """
    part = "" if component == "" else check_component(component, COMPONENTS)
    kinds = ("linear", "conv")
    sites = plain_sites(state, "a pipeline of diffusers", kinds, dtype=dtype, alpha="rank")
    refuse_unfit_sites([site.spec for site in sites.values()], facts, "diffusers, which uses PEFT,")
    tensors: dict[str, Tensor] = {}
    for name, site in sites.items():
        pair, key = zip("AB", pack(site), strict=True), name_in_files(name, part)
        key = joined(part, key)
        tensors |= {f"{key}.lora_{role}.weight": tensor for role, tensor in pair}
    content = serialize(tensors, {"format": "pt"})
    return content if path.suffix == ".safetensors" else {FILE: content}


def read(path: Path, facts: ModelFacts, *, component: str | None = None) -> AdapterState:
    """Read the adapter of one component, or of the model that the file is of (`""`).

    Name the component if the file holds several.
    """
    tensors, said = read_tensors(file_of(path))
    known = set(facts.module_names or ())
    whole = component == "" or (
        component is None and all(_parsed(key, whole=True)[1] in known for key in tensors)
    )
    component, pairs = in_component(tensors, partial(_parsed, whole=whole), component)
    fields = _fields(said, f"{component}." if component else "")
    others = known - pairs.keys()

    def own(name: str) -> str:
        """Return a name as in the model; see `name_in_files`."""
        bare = name.removeprefix("text_model.")
        return bare if name not in known and bare in others else name

    sites = {name: plain_site(own(name), *pair) for name, pair in pairs.items()}
    if fields is not None:
        for name, (_, alpha) in fields.numbers(pairs).items():
            spec = replace(sites[name].spec, alpha=alpha, scaling=fields.scaling)
            sites[name] = replace(sites[name], spec=spec)
    return AdapterState({site.spec.name: site for site in sites.values()})


def _parsed(key: str, *, whole: bool) -> tuple[str, str, str]:
    """Return the component, the module and the role of a tensor.

    `whole` is whether the key begins with the module's name, not with a component's.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        remedy = "Give a LoRA of a pipeline; other variants are merged by diffusers (fuse_lora)"
        raise FormatError("", f"the tensor '{key[:200]}' is not known", remedy)
    module, side = match[2], match[3] or match[4] or match[6] or match[7]
    if match[5]:  # attention processors used to hold the LoRA of their layers
        module = re.sub(r"(self_attn)\.to_(q|k|v|out)$", r"\1.\2_proj", module)
        module = re.sub(r"\.to_out$", ".to_out.0", module.replace(".processor.", "."))
    part = match[1] or ""
    if whole:
        part, module = "", joined(part, module)
    return part, module, {"down": "A", "up": "B"}.get(side, side)


def _fields(said: Mapping[str, str], prefix: str) -> LoraFields | None:
    """Return the header's config of a component, None if there is none."""
    if CONFIG_KEY not in said:
        return None
    where = f"metadata '{CONFIG_KEY}'"
    config: Any = parse_json(said[CONFIG_KEY], where)
    if not isinstance(config, dict):
        raise FormatError(where, "it is not a table of fields", "Fetch the file again")
    mine = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
    if not mine:
        return None
    fields = read_fields({"peft_type": "LORA", **mine}, where)
    if fields.lora_alpha is None:
        raise FormatError(where, "'lora_alpha' is missing", "Fetch the file again")
    return fields
