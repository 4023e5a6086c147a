"""PEFT's directory: adapter_config.json, adapter_model.safetensors, README.md.

The tensors are what `PeftModel.from_pretrained` computes with, so any reader of the format gets the
adapter's outputs; what PEFT cannot express (slices, frozen starts, the base's fingerprint, the
config) is in the metadata of the same safetensors file, so that reading it here gives back the very
adapter. Where the config was edited since, the folder is read as PEFT reads it, with a note.

What PEFT cannot express is refused: adapters on the root module; layers whose weight their parent
reads, and others that its own cannot stand for (`facts.unfit`); parameters together with Conv1D
layers, or with a site on the module that owns them; other kinds than those of `KINDS`. A trained
tensor that is only a part of its module (a norm's weight) is stored under its plain name: PEFT
loads it into the base for good, as it does with biases. An adapter without any site is written so
that PEFT loads its trained tensors.

Source: peft 0.21.2, utils/save_and_load.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_inject.core.adapter.file_keys import check_keys, one_line
from lora_inject.core.adapter.native import Described, describe, is_native, parse
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.strict_json import parse_json, parse_table
from lora_inject.core.files.tensors import read_tensors, serialize
from lora_inject.core.spec.names import parent
from lora_inject.core.spec.sites import SiteSpec, forms
from lora_inject.errors import FormatError, within
from lora_inject.formats.card import model_card
from lora_inject.formats.format import Files, part_of_folder
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.peft.fields import LoraFields, read_fields
from lora_inject.formats.peft.foreign import Foreign
from lora_inject.formats.peft.tensor_layout import (
    KINDS,
    PREFIX,
    attentions,
    file_shapes,
    is_half,
    is_turned,
    layout_of,
    pack,
    unpack,
    wrapped,
)
from lora_inject.formats.peft.written_config import build
from lora_inject.formats.single_experts import as_single_experts

LOG = logging.getLogger("lora_inject")
CONFIG, CARD = "adapter_config.json", "README.md"
MODEL, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
CONFIG_KEY = "lora_adapter_metadata"
"""Key of the config in the header of the tensors, where diffusers looks for it, too."""

_TURNED = "lora_inject.turned"
_EDITED = "The file was edited, or is of a newer version"
_OTHER = 'Write it with format="native": save_adapter(model, path, format="native")'
_MEANINGS = (
    *("alpha_pattern", "bias", "exclude_modules", "layers_pattern", "layers_to_transform"),
    *("lora_alpha", "lora_bias", "modules_to_save", "r", "rank_pattern", "target_modules"),
    *("target_parameters", "trainable_token_indices", "use_dora", "use_rslora"),
)
"""What PEFT asks the config: which tensors it makes and loads, and how it uses them."""

_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "true", "false"}
_RESIDUAL = "Convert it with PEFT (save_pretrained(path_initial_model_for_weight_conversion=...))"


def write(
    state: AdapterState,
    _path: Path,
    facts: ModelFacts,
    *,
    metadata: bool = True,
    trained_on: str | None = None,
    published_as: str | None = None,
    proof: Mapping[str, str] | None = None,
) -> dict[str, bytes]:
    """Write an adapter as a PEFT directory.

    Args:
        state: The adapter.
        _path: Not needed.
        facts: What is known of the model. The task type is left out where PEFT would look for the
            task's head and the adapter does not hold it.
        metadata: Write what PEFT cannot express into the header too, for this package.
        trained_on: For the card: a data set of the hub, or a description.
        published_as: For the card: where readers find the adapter, such as `user/name`.
        proof: Text for the header that says what the adapter does: see `save_adapter(probe=)`.

    Returns:
        The content of each file, by name.

    Raises:
        FormatError: PEFT cannot express the adapter.
    """
    state, tensors, config, turned = contents(state, facts)
    said = {"format": "pt"}
    if metadata:
        said = describe(state, "peft") | {_TURNED: json.dumps(sorted(turned))}
    # Where diffusers looks for the config: 0.42, loaders/peft.py, `load_lora_adapter(prefix=...)`.
    prefixed = {f"{PREFIX}{field}": value for field, value in config.items() if value is not None}
    said[CONFIG_KEY] = json.dumps(prefixed, sort_keys=True)
    said |= proof or {}
    known = {"trained_on": trained_on, "published_as": published_as}
    card = model_card(state, facts, **known, proves=bool(proof))
    return {
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        MODEL: serialize(tensors, said),
        CARD: card.encode(),
    }


class Contents(NamedTuple):
    """An adapter as PEFT has it: the state with its sites in the file's order, and what it becomes.

    `turned` are the sites whose A and B have changed places.
    """

    state: AdapterState
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    turned: set[str]


def contents(state: AdapterState, facts: ModelFacts) -> Contents:
    """Return the tensors and the config of an adapter as PEFT has them, with the file's keys.

    Tensors may share memory with those of the adapter.

    Raises:
        FormatError: PEFT cannot express the adapter.
    """
    state = _in_order(state, facts.tensor_names)
    _check_rows(state, facts)
    specs = [site.spec for site in state.sites.values()]
    check_sites(specs, facts)
    transposed = {spec.name for spec in specs if is_turned(spec, facts.transposed_modules)}
    layout, called = layout_of(specs, state.trained, state.rows), attentions(specs)
    tensors = {layout.trained[name]: tensor for name, tensor in state.trained.items()}
    for name, site in state.sites.items():
        keys, shapes = layout.sites[name], file_shapes(site.spec)
        A, B = pack(site, turned=name in transposed)
        tensors |= {keys["A"]: A, keys["B"]: B / 2 if is_half(name, called) else B}
        for role, tensor in site.further.items():
            tensors[keys[role]] = tensor.detach().reshape(shapes[role])
    return Contents(state, tensors, build(state, facts), transposed)


def read(path: Path, facts: ModelFacts, *, allow: Collection[str] = ()) -> AdapterState:
    """Read a PEFT directory, of this package or of others.

    Args:
        path: The directory that holds adapter_config.json.
        facts: What is known of the model; only files of others with adapted parameters need it.
        allow: Fields of adapter_config.json to accept although they are unknown;
            `init_lora_weights` where the base at hand is the one that PEFT's init has changed;
            `target_modules` to read tensors of modules that the config does not target.

    Returns:
        The adapter. Without metadata its `config` and `fingerprint` are None, and the kind of each
        site is what the file lets one assume, until it is loaded onto a model.

    Raises:
        FormatError: The files are incomplete, contradictory or of a kind that cannot be read right.
    """
    config, tensors, text = opened(path)
    with within(CONFIG):
        fields = _fields_of_file(config, allow)
    tensors = as_single_experts(tensors, config)
    if is_native(text, "peft"):
        with within(MODEL):
            said, edited = parse(text), _edited(config, text)
            if not edited:
                return _read_native(said, _turned(text, said), tensors)
        LOG.warning(
            "%s: %s of %s was edited since: read as PEFT reads it", path, one_line(edited), CONFIG
        )
    any_target = "target_modules" in allow
    return Foreign(fields, facts, any_target, _is_of_unsloth(config)).read(tensors)


def _fields_of_file(config: Mapping[str, Any], allow: Collection[str]) -> LoraFields:
    """Return the fields of a file, which must say alpha and not that the base was changed."""
    fields = read_fields(config, allow=allow)
    init = str(fields.init_lora_weights)
    if init.lower() not in _PLAIN_INITS and "init_lora_weights" not in allow:
        problem = f"it is {init[:40]!r}: with it, PEFT changes the base's weights as it loads"
        remedy = f"{_RESIDUAL}; or, where your base holds the changed weights, pass "
        raise FormatError("'init_lora_weights'", problem, f"{remedy}allow=['init_lora_weights']")
    fields.require_alpha()
    return fields


def _is_of_unsloth(config: Mapping[str, Any]) -> bool:
    """Whether a file has a sign of unsloth, whose older stacks have another layout."""
    mapping, base = config.get("auto_mapping"), config.get("base_model_name_or_path")
    fixed = isinstance(mapping, dict) and bool(mapping.get("unsloth_fixed"))
    return fixed or str(base).startswith("unsloth/")


def _edited(config: Mapping[str, Any], header: Mapping[str, str]) -> list[str]:
    """Return the fields that mean something else now than when the tensors were written."""
    written = _config_in(header)
    return [name for name in _MEANINGS if _meant(config.get(name)) != _meant(written.get(name))]


def _meant(value: Any) -> Any:
    """Return a value in a form that is equal for what PEFT reads alike."""
    if value in (None, False, "none", [], {}):
        return None
    return sorted(map(repr, value)) if isinstance(value, list) else value


def _turned(text: Mapping[str, str], said: Described) -> list[str]:
    """Return the sites whose A and B have changed places in the file, which are parameters."""
    where = f"metadata '{_TURNED}'"
    names: Any = parse_json(text.get(_TURNED, ""), where)
    parameters = {name for name, spec in said.specs.items() if spec.kind == "parameter"}
    turned = [name for name in names if name in parameters] if isinstance(names, list) else None
    if turned is None or turned != names:
        raise FormatError(where, "it does not name sites on parameters", _EDITED)
    return turned


def _read_native(
    said: Described, turned: Collection[str], tensors: dict[str, Tensor]
) -> AdapterState:
    """The state that `write` was given; every tensor is accounted for."""
    check_sites([*said.specs.values()], ModelFacts())
    layout = layout_of(said.specs.values(), said.trained, said.rows)
    check_keys(tensors, layout.keys)
    sites, called = {}, attentions(said.specs.values())
    for name, spec in said.specs.items():
        mine = {role: tensors[key] for role, key in layout.sites[name].items()}
        if is_half(name, called):
            mine["B"] = 2 * mine["B"]
        sites[name] = unpack(spec, mine, turned=name in turned)
    return said.state(sites, {name: tensors[key] for name, key in layout.trained.items()})


def _check_rows(state: AdapterState, facts: ModelFacts) -> None:
    modules, tied = facts.module_names or (), (facts.config or {}).get("tie_word_embeddings")
    for name, rows in state.rows.items():
        problem, module = "", name.removesuffix(".weight")
        alike = [other for other in state.rows if state.rows[other] == rows and tied]
        own = [n for n in alike if not torch.equal(state.trained[n], state.trained[name])]
        if own:
            problem = f"PEFT uses one of '{own[0]}' and it for both, as ends of a tie"
        if f"{module}.bias" in (facts.tensor_names or ()):
            problem = "PEFT leaves out the bias of a layer of whose weight it trains rows"
        if module == name:
            problem = "PEFT trains rows of the weight of a module only"
        if longer := [m for m in modules if m.endswith(module) and m != module]:
            problem = f"PEFT would train rows of '{longer[0]}' too, whose name ends so"
        if problem:
            raise FormatError(f"trained tensor '{name}'", problem, _OTHER)


def _in_order(state: AdapterState, tensor_names: Sequence[str] | None) -> AdapterState:
    """Sites with those on parameters in the order of the model, where that is known.

    PEFT tells two parameters of one module apart by their order only.
    """
    place = {name: n for n, name in enumerate(tensor_names or ())}
    parameters = {name: 0 for name, site in state.sites.items() if site.spec.kind == "parameter"}
    ordered = iter(sorted(parameters, key=lambda name: place.get(name, len(place))))
    names = [next(ordered) if name in parameters else name for name in state.sites]
    return replace(state, sites={name: state.sites[name] for name in names})


# What PEFT can say ------------------------------------------------------------------------------


def check_sites(specs: Sequence[SiteSpec], facts: ModelFacts, client: str = "PEFT") -> None:
    """Refuse sites that PEFT cannot hold, or on modules that its layers cannot stand for.

    `client` is PEFT, or a program that uses its layers.
    """
    alike = forms(specs)
    parameters = {spec.name for spec in specs if spec.kind == "parameter"}
    if parameters and any(form.kind == "conv1d" for form in alike):
        raise FormatError("", "PEFT cannot adapt parameters together with Conv1D layers", _OTHER)
    if len({(form.variant, form.lora_bias) for form in alike}) > 1:
        problem = "PEFT has one variant, with lora_bias or without, for all sites"
        raise FormatError("", f"{problem}, and these sites have several", _OTHER)
    known = {*(facts.tensor_names or ()), *parameters}
    modules = {spec.name for spec in specs} - parameters if parameters else set[str]()
    unfit, some_odd = facts.unfit, any(map(_odd, alike))
    called = attentions(specs) if parameters and client == "PEFT" else {}
    for spec in specs:
        problem = ""
        if spec.name in called:
            continue
        if reason := (some_odd and _odd(spec)) or _inexpressible(spec, modules, known):
            problem = f"PEFT cannot adapt {reason}"
        elif spec.experts and spec.in_features == spec.out_features and not facts.orientation_known:
            problem = "its matrices are square, and PEFT takes them for (out, in) on transformers 4"
            problem += " whatever they are on transformers 5"
        elif spec.kind != "parameter" and unfit and (reason := unfit(spec.name)):
            problem = f"{client} would load it wrong: {reason}"
        if problem:
            raise FormatError(f"site '{spec.name}'", problem, _OTHER)


def _inexpressible(spec: SiteSpec, modules: Collection[str], tensor_names: Collection[str]) -> str:
    """Return what PEFT cannot adapt if a site is such, or ""; `_odd` was asked before."""
    kind = spec.kind
    if not wrapped(spec):
        return "the root module or a parameter of it"
    if kind != "parameter" and spec.update != "weight":
        return ""
    module, dims = parent(spec.weight), len(spec.weight_shape)
    if kind == "linear" and spec.variant == "dora":
        return "a linear layer with DoRA whose own forward it does not know"
    if kind == "conv1d":
        return "the weight of a Conv1D layer whose own forward it does not know"
    if kind not in ("parameter", "linear"):
        return ""
    if kind == "parameter" and module in modules:
        return "a module and a parameter of it"
    if dims != (2 if spec.experts is None else 3):
        return f"a parameter of {dims} dimensions"
    # PEFT up to 0.21 adds the update of an attention's output projection twice.
    if spec.weight == f"{module}.weight" and f"{parent(module)}.in_proj_weight" in tensor_names:
        problem = "the output projection of a MultiheadAttention: nothing would call it. Where its "
        return f"{problem}in_proj_weight has the same rank and scale, PEFT adapts both together"
    return ""


def _odd(spec: SiteSpec) -> str:
    """What about a spec has no place in the layout, or an empty text."""
    if spec.kind not in KINDS:
        return f"a site of kind '{spec.kind}'"
    if spec.experts is not None and spec.kind != "parameter":
        return f"a stack of {spec.experts} layers of kind '{spec.kind}'"
    if spec.variant not in ("lora", "dora"):
        return f"a site of the variant '{spec.variant}'"
    if spec.variant == "dora" and (spec.kind == "parameter" or spec.slices is not None):
        return "a parameter, or slices of a layer, with DoRA"
    if spec.kind == "conv" and spec.weight_shape[:1] != (spec.out_features,):
        return "a convolution whose weight does not begin with its outputs"
    return ""


# The files --------------------------------------------------------------------------------------


def detects(files: Files) -> bool:
    """Whether a path looks like a PEFT adapter, a part of one, or the parent of one."""
    if not files.path.is_dir():
        keys = files.tensor_names()
        return bool(keys) and all(key.startswith(PREFIX) for key in keys)
    return files.has(CONFIG, MODEL, PICKLE) or bool(_adapters_in(files.path))


def opened(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Return the config of a directory, its tensors, and the text of their header.

    A file that was written here has the config in its header and may stand alone.
    """
    if not path.is_dir():
        tensors, text = read_tensors(path)
        if config := _config_in(text):
            return config, tensors, text
        problem = f"there is no {CONFIG} beside it, which holds the alpha"
        raise FormatError("", problem, f"Fetch that, and give the folder with it and {MODEL}")
    remedy = "Check the path"
    if inside := _adapters_in(path):
        remedy = f"Give one of its subfolders {one_line(inside)}; the newest: '{path / inside[-1]}'"
    file = part_of_folder(path, CONFIG, remedy)
    remedy = f"Copy the whole directory; from {PICKLE}, a pickle that can run code, or from "
    remedy += "several files PEFT makes one, where you trust it: load it and save_pretrained"
    model = part_of_folder(path, MODEL, remedy)
    return (parse_table(file.read_bytes(), CONFIG), *read_tensors(model))


def _config_in(header: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of the config that the header of the tensors holds; or none."""
    held = parse_table(header.get(CONFIG_KEY, "{}"), f"metadata {CONFIG_KEY!r}")
    return {k.removeprefix(PREFIX): value for k, value in held.items() if k.startswith(PREFIX)}


def _adapters_in(path: Path) -> list[str]:
    """The names of the subfolders that hold an adapter, the newest last."""
    configs = [child / CONFIG for child in path.iterdir() if (child / CONFIG).is_file()]
    return [config.parent.name for config in sorted(configs, key=lambda c: c.stat().st_mtime_ns)]
