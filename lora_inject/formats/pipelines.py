"""Files of diffusion pipelines, of which an adapter is one component's: kohya's and diffusers'.

Kohya's file (sd-scripts; LyCORIS's LoCon and ComfyUI also read and write it) has for each module
`lora_unet_NAME.lora_down.weight` (A), `.lora_up.weight` (B) and the scalar `.alpha`. The scale is
alpha over the rank of the tensors; without alpha it is 1. NAME is the module's name with `_` for
each dot. This is ambiguous, so NAME is looked up among the names of the model or of the base's
files. A file written here also has the names in its metadata.

Source: kohya-ss/sd-scripts, networks/lora.py (`LoRAModule`, `create_network_from_weights`);
ComfyUI, comfy/lora.py and comfy/weight_adapter/lora.py.

Diffusers' file is `pytorch_lora_weights.safetensors`. Keys are PEFT's under the name of a
component: `unet.NAME.lora_A.weight`. Scales are not tensors: diffusers reads them from the header's
`lora_adapter_metadata`, with default 1; ComfyUI always uses 1. So scales are folded into B. Older
names are read as diffusers does: `.lora.down.weight`, `.lora_linear_layer.down.weight`, and
`.processor.to_q_lora.down.weight` of attention processors. Files of a single model
(`save_lora_adapter`) name no component: their keys are the names of its modules, of which the first
may be a component's (the `decoder` of an autoencoder). The names of the model tell, and
`component=""` reads such a file whole. PEFT's keys without its prefix look alike, and there the
scale is lost: unless the file's name, its header or the model tells, an option has to.

Source: diffusers 0.42.1, loaders/peft.py (`load_lora_adapter`), loaders/lora_base.py
(`pack_weights`), utils/state_dict_utils.py; ComfyUI, comfy/lora.py (generic names under
`diffusion_model.` and `text_encoders.`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_inject.core.adapter.file_keys import check_no_clash, one_line
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.strict_json import parse_json, parse_table
from lora_inject.core.files.tensors import read_tensors, serialize
from lora_inject.core.spec.names import joined, nearest
from lora_inject.errors import FormatError, within
from lora_inject.formats.format import Files
from lora_inject.formats.model_facts import CONVERT, ModelFacts
from lora_inject.formats.pairs import by_module, plain_site, plain_sites
from lora_inject.formats.peft.fields import LoraFields, read_fields
from lora_inject.formats.peft.folder import CONFIG_KEY, check_sites
from lora_inject.formats.peft.tensor_layout import PREFIX, pack

KINDS = ("linear", "conv")
_CLIP = re.compile(r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")


# Components --------------------------------------------------------------------------------------


def _checked(component: str | None, known: Collection[str]) -> str:
    """Return the part of a pipeline that a file is to name; refuse to write one without it."""
    if component is None or component not in known:
        unsaid = "the file has to name the part of a pipeline that the adapted model is"
        problem = unsaid if component is None else f"component is {component!r}"
        raise FormatError("", problem, f'Pass component="unet", or one of {", ".join(known)}')
    return component


def name_in_files(name: str, component: str) -> str:
    """Return the name of a module of a pipeline's component in files for other programs.

    Transformers 5.6 took `text_model.` off the names of CLIPTextModel. ComfyUI, sd-scripts and
    older versions of diffusers read only the names with it, diffusers 0.42.1 both.

    Examples:
        >>> name_in_files("encoder.layers.0.mlp.fc1", "te1")
        'text_model.encoder.layers.0.mlp.fc1'
    """
    flattened = component.startswith("te") and _CLIP.fullmatch(name)
    return f"text_model.{name}" if flattened else name


def _in_component(
    tensors: Mapping[str, Tensor],
    parsed: Callable[[str], tuple[str, str, str]],
    component: str | None,
) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """Return the given component, or the only one, and the tensors of its modules by role.

    `parsed` gives the component, the module and the role (`A`, `B`, `alpha`) of a key.
    """
    places = {key: parsed(key) for key in tensors}
    there = list(dict.fromkeys(part for part, _, _ in places.values()))
    if component is None and len(there) == 1:
        component = there[0]
    if component is None or component not in there:
        held = f"it holds {one_line(there)}" + (f", not '{component}'" if component else "")
        remedy = "Name the one to read, each onto its own model: "
        remedy += f'component="{next(iter(there), "unet")}" (--from-component)'
        if "" in there:
            remedy += '; or component="", if all are names of one model'
        raise FormatError("", held, remedy)
    mine = {key: tensor for key, tensor in tensors.items() if places[key][0] == component}
    return component, by_module(mine, lambda key: places[key][1:])


# Kohya -------------------------------------------------------------------------------------------

KOHYAS = ("unet", "te", "te1", "te2", "te3", "transformer")
_KOHYA = re.compile(r"((?:lora|lycoris)_[^.]+)\.(lora_down\.weight|lora_up\.weight|alpha)")
_START = re.compile(rf"(?:lora_({'|'.join(KOHYAS)})|(lycoris))_(.+)")
_ENDS = {"A": "lora_down.weight", "B": "lora_up.weight", "alpha": "alpha"}
_ROLES = {end: role for role, end in _ENDS.items()}
_NAMES = "lora_inject.names"
_SD_SCRIPTS = "networks.lora"  # sd-scripts' own; LyCORIS computes with W + delta


def is_kohya(files: Files) -> bool:
    """Whether a path is such a file, by its keys."""
    return any(map(_KOHYA.fullmatch, files.tensor_names()))


def write_kohya(
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
    part = _checked(component, KOHYAS)
    sites = plain_sites(state, "a file of kohya's", KINDS, dtype=dtype)
    keys = {name: name_in_files(name, part) for name in sites}
    flat = {name: f"lora_{part}_{key.replace('.', '_')}" for name, key in keys.items()}
    check_no_clash(flat.values())
    tensors: dict[str, Tensor] = {}
    for name, site in sites.items():
        alpha = torch.tensor(site.scale * site.spec.rank, dtype=torch.float32, device="cpu")
        values = zip(_ENDS.values(), (*pack(site), alpha), strict=True)
        tensors |= {f"{flat[name]}.{end}": tensor for end, tensor in values}
    names = json.dumps({flat[name]: name for name in sites})
    said = {"format": "pt", "ss_network_module": _SD_SCRIPTS, _NAMES: names}
    return serialize(tensors, said)


def read_kohya(path: Path, facts: ModelFacts, *, component: str | None = None) -> AdapterState:
    """Read the adapter of one component; name the component if the file holds several.

    The model's module names are not needed for a file that was written here.
    """
    tensors, said = read_tensors(path)
    prefix, modules = _in_component(tensors, _parsed_kohya, component)
    start = prefix if prefix == "lycoris" else f"lora_{prefix}"
    names = _names_in(said)
    known: dict[str, list[str]] = {}
    for module in facts.module_names or ():
        known.setdefault(module.replace(".", "_"), []).append(module)
    by_flat = None if facts.module_names is None else known
    sites = {}
    for flat, of in modules.items():
        with within(f"site '{start}_{flat[:200]}'"):
            name = names.get(f"{start}_{flat}") or _unflattened(flat, by_flat)
            if name in sites:
                raise FormatError("", f"the file holds '{name}' twice", "Fetch it again")
        sites[name] = plain_site(name, of["A"], of["B"], of.get("alpha"))
    by_sd_scripts = said.get("ss_network_module") == _SD_SCRIPTS
    return AdapterState(sites, layers="sd-scripts" if by_sd_scripts else "")


def _parsed_kohya(key: str) -> tuple[str, str, str]:
    """Return the component, the flat name of the module and the role of a tensor."""
    match = _KOHYA.fullmatch(key)
    if match is None:
        problem = (
            f"'{key[:200]}' is not of a LoRA: LoHa, LoKr, DoRA, Tucker and others are not read"
        )
        remedy = "Merge it into the base with the program that made it, and extract a LoRA"
        raise FormatError("", problem, f"{remedy} (lora-inject extract)")
    start = _START.fullmatch(match[1])
    if start is None:
        problem = f"'{match[1][:200]}' does not begin with a component"
        raise FormatError("", problem, f"Known are lora_{', lora_'.join(KOHYAS)} and lycoris")
    return start[1] or start[2], start[3], _ROLES[match[2]]


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


# Diffusers ---------------------------------------------------------------------------------------

FILE, CLIENT = "pytorch_lora_weights.safetensors", "diffusers, which uses PEFT,"
DIFFUSERS = (
    *("unet", "transformer", "transformer_2", "prior", "decoder", "diffusion_model"),
    *("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoders"),
)
_SCALED = "lora_inject.scale"  # in the header of files that were written here
_KEY = re.compile(
    rf"(?:({'|'.join(DIFFUSERS)})\.)?(.+?)"
    r"(?:\.lora_([AB])|\.lora(?:_linear_layer)?\.(down|up)|(_lora)\.(down|up)|\.(alpha))(\.weight)?"
)


def is_of_diffusers(files: Files) -> bool:
    """Whether a path is such a file, by its keys, or a folder that holds one."""
    in_folder = files.has(FILE)
    matches = [_KEY.fullmatch(key) for key in files.tensor_names(FILE if in_folder else "")]
    is_named = in_folder or files.path.name == FILE
    if any(match and (match[1] or is_named) for match in matches):
        return True
    of_one_model = [match and match[8] and not match[2].startswith(PREFIX) for match in matches]
    return bool(matches) and all(of_one_model)


def unsure(files: Files, facts: ModelFacts, options: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return what to ask where a lone file of pairs may be of a pipeline, or of any PEFT adapter.

    The scale of the one is 1, and of the other its alpha is lost.
    """
    inside = FILE if files.has(FILE) else ""
    if inside or files.path.name == FILE or {"component", "alpha"} & options.keys():
        return None
    matches = [_KEY.fullmatch(key) for key in files.tensor_names()]
    places = {(match[1] or "", match[2]) for match in matches if match}
    says_it = {CONFIG_KEY, _SCALED} & files.metadata().keys()
    if says_it or len({part for part, _ in places}) > 1 or not all(m and m[3] for m in matches):
        return None  # only pipelines have several parts, and tensors of such names
    known = {*(facts.module_names or ())}
    in_part = all(name in known or name.removeprefix("text_model.") in known for _, name in places)
    if in_part and not all(joined(part, name) in known for part, name in places):
        return None
    part, _ = next(iter(places))
    problem = "its tensors are pairs, and nothing says their alpha: not their names, no file beside"
    remedy = f'Name the part of a pipeline that it is of, whose scale is 1: component="{part}" '
    remedy += '(--from-component); or give format="diffusers" for a scale of 1, or alpha=, with '
    return problem, f"{remedy}which it was trained"


def write_diffusers(
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
    part = "" if component == "" else _checked(component, DIFFUSERS)
    sites = plain_sites(state, "a pipeline of diffusers", KINDS, dtype=dtype, alpha="rank")
    check_sites([site.spec for site in sites.values()], facts, CLIENT)
    tensors: dict[str, Tensor] = {}
    for name, site in sites.items():
        key = joined(part, name_in_files(name, part))
        pair = zip("AB", pack(site), strict=True)
        tensors |= {f"{key}.lora_{role}.weight": tensor for role, tensor in pair}
    content = serialize(tensors, {"format": "pt", _SCALED: "1"})
    return content if path.suffix == ".safetensors" else {FILE: content}


def read_diffusers(
    path: Path, facts: ModelFacts, *, component: str | None = None, alpha: float | None = None
) -> AdapterState:
    """Read the adapter of one component, or of the model that the file is of (`""`).

    Name the component if the file holds several. `alpha` is that of all pairs, for files that do
    not say it; without it their scale is 1, as in diffusers.
    """
    tensors, said = read_tensors(path / FILE if path.is_dir() else path)
    known = set(facts.module_names or ())
    whole = component == "" or (
        component is None
        and (alpha is not None or all(_parsed(key, whole=True)[1] in known for key in tensors))
    )
    component, modules = _in_component(tensors, partial(_parsed, whole=whole), component)
    fields = _fields(said, f"{component}." if component else "")
    if alpha is not None and (fields is not None or any("alpha" in of for of in modules.values())):
        raise FormatError("", "the file says its alpha, and another is given", "Leave alpha out")
    numbers = fields.numbers(modules) if fields is not None else {}
    others = known - modules.keys()
    sites = {}
    for name, of in modules.items():
        bare = name.removeprefix("text_model.")  # see `name_in_files`
        own = bare if name not in known and bare in others else name
        site = plain_site(own, of["A"], of["B"], of.get("alpha", alpha))
        if fields is not None:
            spec = replace(site.spec, alpha=numbers[name][1], scaling=fields.scaling)
            site = replace(site, spec=spec)
        sites[own] = site
    return AdapterState(sites, layers="PEFT")


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
    config = parse_table(said[CONFIG_KEY], where)
    mine = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
    if not mine:
        return None
    fields = read_fields({"peft_type": "LORA", **mine}, where)
    fields.require_alpha(where)
    return fields
