"""PEFT's directory: adapter_config.json, adapter_model.safetensors, README.md.

The tensors are what `PeftModel.from_pretrained` computes with, so any reader of the
format gets the adapter's outputs; what PEFT cannot express (slices, frozen starts, the base's
fingerprint, the config) is in the metadata of the same safetensors file, so that reading it here
gives back the very adapter. Where the two disagree, somebody edited one of them, and that is an
error which the caller decides (`prefer`).

What PEFT cannot express is refused: adapters on the root module; layers whose weight their parent
reads; parameters beside Conv1D layers, or beside a site on the module that owns them; other kinds
than those of `KINDS`. A trained tensor that is only a part of its module (a norm's weight) travels
under its plain name: PEFT loads it into the base for good, as it does with biases. An adapter
without any site is written so that PEFT loads its trained tensors.

Source: peft 0.21.2, utils/save_and_load.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lora_inject.adapter.site_state import SiteState
from lora_inject.adapter.state import AdapterState
from lora_inject.errors import FormatError
from lora_inject.formats import metadata as words
from lora_inject.formats.card import model_card
from lora_inject.formats.checks import check_keys, check_no_clash, check_site, check_trained
from lora_inject.formats.peft.adapter_config import Claims, Entry, build, read_claims
from lora_inject.formats.peft.files import (
    CARD,
    CONFIG,
    MODEL,
    PICKLE,
    check_files,
    read_all,
    read_config,
)
from lora_inject.formats.peft.foreign import read_foreign, with_further
from lora_inject.formats.peft.module_fields import (
    allowed_task,
    bias_setting,
    target_modules,
    whole_modules,
)
from lora_inject.formats.peft.number_patterns import common
from lora_inject.formats.peft.tensor_layout import (
    KINDS,
    PREFIX,
    Packing,
    file_alpha,
    file_rank,
    file_shapes,
    further_shape,
    is_turned,
    owner,
    pack,
    plan,
    unpack,
    wrapped,
)
from lora_inject.spec.sites import SiteSpec
from lora_inject.storage.atomic import write_directory
from lora_inject.storage.tensors import serialize

_OTHER = 'Write it with format="native"'


def write(
    state: AdapterState,
    path: Path,
    *,
    overwrite: bool = False,
    module_names: Collection[str] | None = None,
    tensor_names: Sequence[str] | None = None,
    transposed_modules: Collection[str] | None = None,
    expert_names: Collection[str] = (),
    base_model: str | None = None,
    task_type: str | None = None,
    trained_on: str | None = None,
    published_as: str | None = None,
) -> Path:
    """Write an adapter as a PEFT directory.

    Args:
        state: The adapter.
        path: The directory.
        overwrite: Replace an adapter that is there already.
        module_names: All module names of the model; with them, names that PEFT would take for
            other modules too are written as one anchored expression.
        tensor_names: All names of the model's state dict, in order; with them, trained tensors
            that make up whole modules are written as PEFT's `modules_to_save`.
        transposed_modules: Names of the modules that have transformers' `is_transposed`, which hold
            their experts as (experts, in, out); without them every module is taken to hold them as
            its sites say.
        expert_names: Last parts of names that PEFT takes for experts in this model; linear layers
            called so, and those with a forward of their own, are written as `target_parameters`,
            with the same tensors.
        base_model: Name or path of the base, for the config and the model card.
        task_type: PEFT's task type, such as `CAUSAL_LM`. Left out where PEFT would look for the
            task's head and the adapter does not hold it.
        trained_on: For the card: a data set of the hub, or a description.
        published_as: For the card: where readers find the adapter, such as `user/name`.

    Returns:
        The directory that was written.

    Raises:
        FormatError: PEFT cannot express the adapter, or the target must not be replaced.
    """
    found = contents(
        state,
        f"write adapter to '{path}'",
        module_names=module_names,
        tensor_names=tensor_names,
        transposed_modules=transposed_modules,
        expert_names=expert_names,
        base_model=base_model,
        task_type=task_type,
    )
    said = words.describe(found.state, "peft", found.turned)
    card = model_card(
        found.state,
        base_model=base_model,
        task_type=task_type,
        trained_on=trained_on,
        published_as=published_as,
    )
    return write_folder(path, found, said, card, overwrite=overwrite)


class Contents(NamedTuple):
    """The contents of a PEFT directory, with sites in the order of the file."""

    state: AdapterState
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    turned: Collection[str]


def write_folder(
    path: Path,
    found: Contents,
    said: Mapping[str, str],
    card: str,
    *,
    overwrite: bool,
) -> Path:
    """Write a directory of PEFT, with `said` as the metadata of its tensors, and the card."""
    files = {
        CONFIG: (json.dumps(found.config, indent=2, sort_keys=True) + "\n").encode(),
        MODEL: serialize(found.tensors, {**said, **for_diffusers(found.config, PREFIX)}),
        CARD: card.encode(),
    }
    return write_directory(path, files, overwrite=overwrite, replaceable={PICKLE})


def contents(
    state: AdapterState,
    asked: str,
    *,
    module_names: Collection[str] | None = None,
    tensor_names: Sequence[str] | None = None,
    transposed_modules: Collection[str] | None = None,
    expert_names: Collection[str] = (),
    base_model: str | None = None,
    task_type: str | None = None,
) -> Contents:
    """Return the tensors and the config of an adapter in PEFT's layout; options as for `write`."""
    check_trained(state, asked)
    state = _rows_once(state, asked)
    for site in state.sites.values():
        check_site(site, asked)
    state = dataclasses.replace(state, sites=_in_order(state.sites, tensor_names))
    specs = [site.spec for site in state.sites.values()]
    _check_expressible(specs, asked, tensor_names)
    layout = plan(specs, state.trained, state.rows)
    full = [name for name in state.trained if name not in state.rows]
    check_no_clash(layout.keys, asked)
    turned = {spec.name for spec in specs if is_turned(spec, transposed_modules)}

    tensors: dict[str, Tensor] = {}
    for name, site in state.sites.items():
        slot = layout.slots[name]
        tensors[slot.a], tensors[slot.b] = pack(site, turned=name in turned)
        for role, key in slot.further.items():
            tensors[key] = site.further[role].detach().reshape(further_shape(site.spec, role))
    tensors.update((layout.trained[name], tensor) for name, tensor in state.trained.items())

    rslora = bool(specs) and all(spec.scaling == "rslora" for spec in specs)
    entries = [_entry(site, expert_names, rslora=rslora) for site in state.sites.values()]
    modules = [entry.name for entry in entries if entry.kind != "parameter"]
    adapted = {wrapped(spec) for spec in specs}
    whole = whole_modules(full, sites=adapted, tensor_names=tensor_names, module_names=module_names)
    config = build(
        entries,
        rslora=rslora,
        dora=any(spec.variant == "dora" for spec in specs),
        dropout=common(spec.dropout for spec in specs) or 0.0,
        bias=bias_setting(full, sites=adapted, whole=whole),
        lora_bias=any(spec.lora_bias for spec in specs),
        tokens={owner(name): list(rows) for name, rows in state.rows.items()},
        modules_to_save=whole,
        target_modules=target_modules(
            modules, parameters=len(modules) < len(specs), module_names=module_names
        ),
        base_model=base_model,
        task_type=allowed_task(task_type, whole=whole),
    )
    return Contents(state, tensors, config, turned)


def read(
    path: Path,
    *,
    prefer: Literal["metadata", "config"] | None = None,
    allow: Collection[str] = (),
    tensor_names: Sequence[str] | None = None,
    transposed_modules: Collection[str] | None = None,
    expert_major: bool = False,
    on_disk: bool = False,
) -> AdapterState:
    """Read a PEFT directory, of this package or of others.

    Args:
        path: The directory that holds adapter_config.json.
        prefer: Which to believe where the metadata and adapter_config.json disagree; `config` reads
            the file as any PEFT would, without slices and frozen starts.
        allow: Fields of adapter_config.json to accept although they are unknown, or
            `init_lora_weights` where the base at hand is the one that PEFT's init has changed.
        tensor_names: All names of the model's state dict, in order: needed only for files of
            others with two adapted parameters on one module, whose names the file does not hold.
        transposed_modules: Names of the modules that have transformers' `is_transposed`: needed
            only for files of others with stacks of square experts, whose class the file does not
            name.
        expert_major: Whether the columns of a stacked B are ordered by expert first, as unsloth
            writes them; the file does not tell.
        on_disk: Leave the values in the file until they are used (`storage.tensors.read_tensors`).

    Returns:
        The adapter. Without metadata its `config` and `fingerprint` are None, and the kind of each
        site is what the file lets one assume, until it is loaded onto a model.

    Raises:
        FormatError: The files are incomplete, contradictory or of a kind that cannot be read right.
    """
    path = Path(path)
    asked = f"read adapter '{path}'"
    if prefer not in {None, "metadata", "config"}:
        raise FormatError(asked, f"prefer is {prefer!r}", "Give 'metadata', 'config' or None")
    check_files(path, asked)
    where = f"{asked}, {CONFIG}"
    claims = None
    if prefer != "metadata":
        claims = read_claims(read_config(path, where), where, allow)
    tensors, text = read_all(path, asked, on_disk=on_disk)
    if claims is None and not words.is_native(text, "peft"):
        raise FormatError(
            asked, f"its {MODEL} holds no metadata of this package", "Leave prefer out"
        )
    if claims is not None and (prefer == "config" or not words.is_native(text, "peft")):
        return read_foreign(
            tensors,
            claims,
            asked,
            tensor_names=tensor_names,
            transposed_modules=transposed_modules,
            expert_major=expert_major,
        )
    described = words.parse(text, f"{asked}, {MODEL}")
    if claims is not None:
        _check_agreement(described, claims, asked)
    return _read_native(described, tensors, f"{asked}, {MODEL}")


def _read_native(
    described: words.Described, tensors: dict[str, Tensor], asked: str
) -> AdapterState:
    """The state that `write` was given; every tensor is accounted for."""
    for name, spec in described.specs.items():
        if _odd(spec) or (name in described.turned and spec.kind != "parameter"):
            raise FormatError(
                f"{asked}, site '{name[:200]}'",
                f"its metadata says what cannot be ({_odd(spec) or 'turned'})",
                "The file was edited, or is of a newer version",
            )
    layout = plan(described.specs.values(), described.trained, described.rows)
    check_no_clash(layout.keys, asked)
    check_keys(tensors, layout.keys, asked)
    sites = {}
    for name, spec in described.specs.items():
        packing = Packing(name in described.derived, name in described.turned)
        slot = layout.slots[name]
        a, b = tensors[slot.a], tensors[slot.b]
        due_a, due_b = file_shapes(spec, packing)
        if a.shape != due_a or b.shape != due_b:
            key, tensor, due = (slot.b, b, due_b) if a.shape == due_a else (slot.a, a, due_a)
            raise FormatError(
                f"{asked}, '{key}'",
                f"its shape is {tuple(tensor.shape)}, and its metadata says {due}",
                "The file was edited; fetch it again",
            )
        further = {role: tensors[key] for role, key in slot.further.items()}
        sites[name] = with_further(unpack(spec, a, b, asked, packing), further, asked)
        check_site(sites[name], asked)
    trained = {name: tensors[key] for name, key in layout.trained.items()}
    found = AdapterState(
        sites, trained, described.config, described.fingerprint, rows=described.rows
    )
    check_trained(found, asked)
    return found


def _check_agreement(described: words.Described, claims: Claims, asked: str) -> None:
    """Refuse a config whose ranks or scales are not those of the metadata."""
    called = {
        name: spec.weight if spec.weight in claims.target_parameters else name
        for name, spec in described.specs.items()
    }
    numbers = claims.numbers(called.values())
    for name, spec in described.specs.items():
        derived = name in described.derived
        rank = file_rank(spec, derived=derived)
        claimed, alpha = numbers[called[name]]
        if claimed is not None and claimed != rank:
            raise _contradiction(asked, name, f"rank {claimed}", f"rank {rank}")
        scale = claims.scale(alpha, rank)
        if not math.isclose(scale, spec.scale, rel_tol=1e-6):
            due = file_alpha(spec, derived=derived, rslora=claims.rslora)
            config = f"alpha {alpha:g} (scale {scale:g})"
            raise _contradiction(asked, name, config, f"alpha {due:g} (scale {spec.scale:g})")


def _contradiction(asked: str, name: str, config: str, metadata: str) -> FormatError:
    return FormatError(
        f"{asked}, site '{name}'",
        f"{CONFIG} says {config}, the metadata of {MODEL} says {metadata}",
        'Decide which is right: prefer="metadata" is what was saved, prefer="config" what was '
        "edited since",
    )


def _rows_once(state: AdapterState, asked: str) -> AdapterState:
    """Leave out rows under further names of a tied tensor: PEFT copies them itself."""
    first: dict[int, str] = {}
    for name in state.rows:
        if not name.endswith(".weight"):
            found = "PEFT trains rows of the weight of a module only"
            raise FormatError(f"{asked}, trained tensor '{name}'", found, _OTHER)
        first.setdefault(state.trained[name].data_ptr(), name)
    further = state.rows.keys() - set(first.values())
    if not further:
        return state
    return dataclasses.replace(
        state,
        trained={name: t for name, t in state.trained.items() if name not in further},
        rows={name: rows for name, rows in state.rows.items() if name not in further},
    )


# What PEFT can say ------------------------------------------------------------------------------


def _entry(site: SiteState, expert_names: Collection[str], *, rslora: bool) -> Entry:
    spec, derived = site.spec, site.A0 is not None
    alpha = file_alpha(spec, derived=derived, rslora=rslora)
    name, kind = spec.name, spec.kind
    by_weight = spec.update == "weight" or name.rpartition(".")[2] in expert_names
    if kind == "linear" and by_weight:
        name, kind = spec.weight, "parameter"
    return Entry(name, kind, file_rank(spec, derived=derived), alpha)


def for_diffusers(config: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """The config in the header, where diffusers looks for it, under the prefix of the tensors.

    Source: diffusers 0.42, loaders/peft.py, `load_lora_adapter(prefix=...)`.
    """
    said = {f"{prefix}{field}": value for field, value in config.items() if value is not None}
    return {"lora_adapter_metadata": json.dumps(said, sort_keys=True)}


def _in_order(
    sites: Mapping[str, SiteState], tensor_names: Sequence[str] | None
) -> Mapping[str, SiteState]:
    """Sites with those on parameters in the order of the model, where that is known.

    PEFT tells two parameters of one module apart by their order only.
    """
    place = {name: n for n, name in enumerate(tensor_names or ())}
    if not place:
        return sites
    parameters = [name for name, site in sites.items() if site.spec.kind == "parameter"]
    ordered = iter(sorted(parameters, key=lambda name: place.get(name, len(place))))
    swapped = dict(zip(parameters, ordered, strict=True))
    return {swapped.get(name, name): sites[swapped.get(name, name)] for name in sites}


def _check_expressible(
    specs: Sequence[SiteSpec], asked: str, tensor_names: Sequence[str] | None
) -> None:
    """Refuse what a PEFT file cannot say, before anything is written."""
    parameters = {spec.name for spec in specs if spec.kind == "parameter"}
    modules = {spec.name for spec in specs if spec.kind != "parameter"}
    if parameters and any(spec.kind == "conv1d" for spec in specs):
        raise FormatError(asked, "PEFT cannot adapt parameters together with Conv1D layers", _OTHER)
    if len({(spec.variant, spec.lora_bias) for spec in specs}) > 1:
        found = "PEFT has one variant, with lora_bias or without, for all sites"
        raise FormatError(asked, f"{found}, and these sites have several", _OTHER)
    known = set(tensor_names or ()) | parameters
    for spec in specs:
        reason = _inexpressible(spec, modules, known)
        if reason:
            raise FormatError(f"{asked}, site '{spec.name}'", f"PEFT cannot {reason}", _OTHER)


def _inexpressible(spec: SiteSpec, modules: Collection[str], tensor_names: Collection[str]) -> str:
    """Why PEFT cannot carry this site, or an empty text."""
    if _odd(spec):
        return f"adapt {_odd(spec)}"
    if not wrapped(spec):
        return "adapt the root module or a parameter of it"
    by_weight = spec.update == "weight"
    if by_weight and spec.kind == "linear" and spec.variant == "dora":
        return "adapt a linear layer with DoRA whose own forward it does not know"
    if spec.kind == "conv1d" and by_weight:
        return "adapt the weight of a Conv1D layer whose own forward it does not know"
    if spec.kind != "parameter" and not (spec.kind == "linear" and by_weight):
        return ""
    module, _, tensor = spec.weight.rpartition(".")
    if spec.kind == "parameter" and module in modules:
        return "adapt a module and a parameter of it"
    if len(spec.weight_shape) != (2 if spec.experts is None else 3):
        return f"adapt a parameter of {len(spec.weight_shape)} dimensions"
    if tensor == "weight" and f"{owner(module)}.in_proj_weight" in tensor_names:
        return "adapt the output projection of a MultiheadAttention: nothing would call it"
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
