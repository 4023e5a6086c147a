"""Translate PEFT's LoraConfig to a config of this package; refuse other fields by name.

PEFT's own rules are run on the names of a model: the config's targets are those that hit the same
names, or else exactly these, by their numbers. Without a model a field that is a rule about names
is refused, but for the targets themselves.

Source: peft 0.21.2, tuners/lora/config.py; tuners/tuners_utils.py, `check_target_module_exists`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from lora_inject.core.files.strict_json import parse_table
from lora_inject.core.spec.config import Config
from lora_inject.core.spec.inventory import Inventory
from lora_inject.core.spec.names import Below, canonical, leaf, nearest
from lora_inject.core.spec.patterns import Names
from lora_inject.core.spec.reading import read_text
from lora_inject.core.spec.resolve import linear_layers
from lora_inject.errors import ConfigError, FormatError, user_path
from lora_inject.formats.live_models import expert_names
from lora_inject.formats.peft.fields import HEADS, LoraFields, read_fields, whole
from lora_inject.formats.peft.name_patterns import ends

_INITS = {"true": "kaiming", "gaussian": "gaussian", "pissa": "pissa", "olora": "olora"}
_ALL = "all-linear"


def from_peft(
    config: Any, *, inventory: Inventory | None = None, model: nn.Module | None = None
) -> Config:
    """Translate a `LoraConfig`, field by field; PEFT is not imported.

    Fields about training or files are ignored. A name in `target_modules` that the model does not
    have is an error when the config is used.

    Args:
        config: A `LoraConfig`, its plain data, or the path of an adapter_config.json or of the
            folder that holds it.
        inventory: The names of the model (`inject` gives them), on which PEFT's rules are run.
        model: The model itself (`inject` gives it), some of whose names PEFT reads as experts.

    Raises:
        ConfigError: A field cannot be translated, or the file cannot be read.

    Examples:
        >>> config = from_peft({"r": 16, "target_modules": ["q"], "modules_to_save": ["lm_head"]})
        >>> config.to_dict()["targets"], config.rank, config.train
        (['q'], 16, ('[^.]*lm_head',))
    """
    asked, plain = _plain_data(config)
    lora = read_fields({"peft_type": "LORA", **plain}, asked, ConfigError)
    if not lora.target_modules and not lora.target_parameters:
        problem = "it is missing: PEFT has a list of names for each type of model"
        raise _error(asked, "target_modules", problem, "Give target_modules, such as 'all-linear'")
    if lora.lora_bias:
        remedy = "Leave it out, and train the layers' own biases: bias='lora_only'"
        raise _error(asked, "lora_bias", "a bias of B does not train here", remedy)
    heads = HEADS.get(lora.task_type or "", ())
    saved = [re.escape(name) for name in lora.modules_to_save if name not in heads]
    # A model has one of several heads.
    saved += [f"({'|'.join(heads)})"] if len(heads) > 1 else heads
    train = [f"[^.]*{name}" for name in saved]  # PEFT matches the end of a name, without a dot
    lora = lora.model_copy(update={"modules_to_save": [*lora.modules_to_save, *heads]})
    if inventory is None:
        # What is kept whole is not adapted; a list of names is matched by whole segments.
        exclude = saved if isinstance(lora.target_modules, str) else []
        targets = _rules(lora, asked)
    else:
        _check_saved(train, inventory, asked)
        if model is not None and any(candidate.experts for candidate in inventory.candidates):
            _refuse_experts(lora, expert_names(model), asked)
        targets, exclude = _rules_on(inventory, lora, asked), []
    ours = {
        "rank": lora.r or 8,
        "alpha": lora.lora_alpha or 8,
        "dropout": lora.lora_dropout,
        "init": _init(lora.init_lora_weights, asked),
        "scaling": lora.scaling,
        "variant": "dora" if lora.use_dora else "lora",
        "bias": "adapted" if lora.bias == "lora_only" else lora.bias,
        "train": train,
        "exclude": exclude,
        "tokens": _tokens(lora.trainable_token_indices, inventory, asked),
        "targets": targets,
    }
    return Config.from_dict(ours)


def config_of(
    config: Any, inventory: Inventory | None = None, model: nn.Module | None = None
) -> Config:
    """Return a `Config`, a dict, the path of a YAML file or a `LoraConfig` as a `Config`.

    The other arguments are those of `from_peft`.

    Raises:
        ConfigError: It is none of these, or not valid.
    """
    if is_of_peft(config):
        return from_peft(config, inventory=inventory, model=model)
    return Config.coerce(config)


def is_of_peft(config: object) -> bool:
    """Return whether a value is of a class of PEFT, which need not be imported."""
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(config).__mro__)


# Fields -----------------------------------------------------------------------------------------


def _plain_data(config: Any) -> tuple[str, dict[str, Any]]:
    """Return the config's name in messages, and its fields as plain data."""
    if isinstance(config, str | PathLike):
        return f"from_peft '{config}'", _data_in(user_path("from_peft", config, ConfigError))
    if isinstance(config, Mapping):
        return "from_peft", dict(config)
    if not is_of_peft(config):
        problem = f"a value of type {type(config).__name__}"
        raise ConfigError("from_peft", problem, "Give a LoraConfig, a dict, or a path")
    if getattr(config, "_custom_modules", None):
        problem = "custom layers are registered in it"
        raise ConfigError("from_peft", problem, "Register a kind of layer: extending.register_kind")
    return f"from_peft({type(config).__name__})", config.to_dict()


def _data_in(path: Path) -> dict[str, Any]:
    file = path / "adapter_config.json" if path.is_dir() else path
    asked = f"from_peft '{file}'"
    return parse_table(read_text(file, asked, "Give an adapter_config.json"), asked, ConfigError)


def _error(asked: str, field: str, problem: str, remedy: str) -> ConfigError:
    return ConfigError(f"{asked}, '{field}'", problem, remedy)


def _init(init: bool | str, asked: str) -> str:
    name = re.sub(r"^pissa_niter_\d+$", "pissa", str(init).lower())
    if name not in _INITS:
        problem = f"there is no init {init!r}"
        if name == "false":
            problem = "it makes B random, so the adapter would not start at zero"
        raise _error(asked, "init_lora_weights", problem, "Choose True, gaussian, pissa or olora")
    return _INITS[name]


def _check_saved(train: Iterable[str], inventory: Inventory, asked: str) -> None:
    """Refuse the name of a parameter: PEFT skips it, and here it would train."""
    modules, parameters = Names(inventory.modules), Names(inventory.listed)
    for pattern in train:
        below = Below(modules.matching(pattern, asked))
        for name in parameters.matching(pattern, asked):
            if name not in below:
                problem = f"'{name}' is a parameter, and PEFT saves modules only"
                raise _error(asked, "modules_to_save", problem, "Name the module that it is in")


def _tokens(
    given: list[int] | dict[str, list[int]], inventory: Inventory | None, asked: str
) -> dict[str, list[int]]:
    if isinstance(given, dict):
        return {re.escape(name): ids for name, ids in given.items()}
    here = [c.name for c in inventory.candidates if c.kind == "embedding"] if inventory else []
    if len(here) != 1:
        there = f", and there are {len(here)}" if inventory else ""
        remedy = "Give a dict, such as {'embed_tokens': [32000, 32001]}"
        problem = f"it does not name an embedding{there}"
        raise _error(asked, "trainable_token_indices", problem, remedy)
    return {re.escape(here[0]): given}


# Rules by the names of a model ------------------------------------------------------------------


def _rules_on(inventory: Inventory, lora: LoraFields, asked: str) -> list[Any]:
    """Return rules for exactly the names of a model that PEFT adapts, with its numbers."""
    try:
        kinds, taken = _adapted(inventory, lora, asked)
    except FormatError as error:
        raise ConfigError(f"{asked}, {error.asked}", error.found, error.remedy) from None
    direct = _targets(lora)
    if not lora.rank_pattern and not lora.alpha_pattern:
        named = {name for c in inventory.candidates for name in (c.name, *c.aliases)}
        linear = {*linear_layers(inventory)}
        hit = linear if direct == [_ALL] else _matching(direct, named | taken.keys(), asked)
        if taken.keys() == hit:
            return direct
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, numbers in taken.items():
        groups.setdefault((*numbers, kinds[name]), []).append(re.escape(name))
    return [
        {"match": f"^(?:{'|'.join(names)})", "rank": rank or 8, "alpha": alpha or 8, "kind": kind}
        for (rank, alpha, kind), names in groups.items()
    ]


def _matching(patterns: Iterable[str], names: Iterable[str], asked: str) -> set[str]:
    known = Names(names)
    return {name for each in patterns for name in known.matching(each, asked)}


def _adapted(
    inventory: Inventory, lora: LoraFields, asked: str
) -> tuple[dict[str, str], dict[str, tuple[int | None, float]]]:
    """Return the kinds of all names, and the rank and alpha of those that PEFT adapts."""
    kinds = dict[str, str]()
    for c in inventory.candidates:
        kinds |= dict.fromkeys((c.name, *c.aliases), c.kind)
        if c.kind != "parameter":
            kinds[canonical(c.weight)] = "parameter"
    given = lora.target_modules
    modules = [name for name, kind in kinds.items() if kind != "parameter"]
    if isinstance(given, str) and given.lower() == _ALL:
        modules = linear_layers(inventory)
    left = dict(lora.left_out(modules)) if given else dict.fromkeys(modules, "target_modules")
    _check_targets(lora, modules, kinds, left, asked)
    names = [name for name in modules if name not in left]
    ends = tuple(f".{name}" for name in lora.target_parameters)
    names += [n for n in kinds if kinds[n] == "parameter" and f".{n}".endswith(ends)]
    targeted = [name for name, field in left.items() if field != "target_modules"]
    if targeted and not names:
        field = left[targeted[0]]
        problem = f"with it none of {len(targeted)} targeted layers is adapted, such as "
        problem += f"'{targeted[0]}': it is {getattr(lora, field)!r}"
        raise _error(asked, field, problem, "Target some others; layers are counted from 0")
    known = Names(names)
    for table in ("rank_pattern", "alpha_pattern"):
        for key in getattr(lora, table):
            if not known.matching(key, asked):
                problem = f"the key {key!r} matches none of the targeted modules"
                raise _error(asked, table, problem, "Remove it, or correct it")
    if lora.ensure_weight_tying:
        tied = {name for c in inventory.candidates if c.tied for name in (c.name, *c.aliases)}
        if both := tied.intersection(names):
            problem = f"'{min(both)}' is tied, and adapters here are not shared between tied layers"
            remedy = "Leave it out of the targets"
            raise _error(asked, "ensure_weight_tying", problem, remedy)
    return kinds, lora.numbers(names)


def _check_targets(
    lora: LoraFields,
    modules: Iterable[str],
    kinds: Mapping[str, str],
    left: Mapping[str, str],
    asked: str,
) -> None:
    """Refuse a target that no module of the model, or no parameter, has."""
    given = lora.target_modules
    listed = given if isinstance(given, list) else []
    hit = [name for name in modules if left.get(name) != "target_modules"]
    known = Names(hit)
    lost = [(t, "target_modules") for t in listed if not known.matching(re.escape(t), asked)]
    if isinstance(given, str) and not hit:
        lost = [(given, "target_modules")]
    parameters = Names(name for name, kind in kinds.items() if kind == "parameter")
    for target in lora.target_parameters:
        if not parameters.matching(re.escape(target), asked):
            lost.append((target, "target_parameters"))
    for target, field in lost:
        near = ", ".join(f"'{name}'" for name in nearest(target, kinds)) or "none"
        remedy = f"Nearest: {near}; modules are named in target_modules, others in "
        raise _error(asked, field, f"{target!r} matches nothing", f"{remedy}target_parameters")


def _refuse_experts(lora: LoraFields, renamed: Mapping[str, str], asked: str) -> None:
    """Refuse targets that PEFT, on transformers 5, changes to those of a model's stacked experts.

    `renamed` are old names of experts, which it takes for their parameters even where a dense layer
    has one of them. Of a regex or `all-linear` it keeps the ends of the names that are hit.

    Source: peft/utils/transformers_weight_conversion.py, `_convert_peft_config_moe`.
    """
    given = lora.target_modules
    old = [name for name in given or () if leaf(name) in renamed]
    if isinstance(given, str) and renamed:
        old = [given]
    if old:
        problem = f"on this model PEFT adapts experts, or more layers than meant, with {old[0]!r}"
        remedy = "Give a list of other names, and in target_parameters those of the experts; or a "
        remedy += "config of this package, {'targets': ['all-linear', 'all-experts']}"
        raise _error(asked, "target_modules", problem, remedy)


# Rules without a model --------------------------------------------------------------------------


def _targets(lora: LoraFields) -> list[str]:
    """Return a pattern for each target; names that end in another target are left out."""
    given = lora.target_modules
    names = {*lora.target_parameters, *(given if isinstance(given, list) else ())}
    shortest = [name for name in sorted(names) if names.isdisjoint([*ends(name)][1:])]
    patterns = [re.escape(name) for name in shortest]
    if isinstance(given, str):
        return [_ALL if given.lower() == _ALL else whole(given), *patterns]
    return patterns


def _rules(lora: LoraFields, asked: str) -> list[str]:
    """Return a pattern for each target; refuse fields that say what holds for some names.

    PEFT leaves out a name, and nothing below it, and counts layers by the last number.
    """
    numbers = ("rank_pattern", "alpha_pattern", "layers_pattern")
    for field in (*numbers, "layers_to_transform", "exclude_modules"):
        if getattr(lora, field) not in (None, [], {}, ""):
            problem = "it is read with the names of a model, and none is given"
            raise _error(asked, field, problem, "Give the LoraConfig to inject(model, config)")
    return _targets(lora)
