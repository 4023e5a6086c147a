"""Translate PEFT's LoraConfig to a config of this package; refuse other fields by name.

PEFT looks numbers up in tables of patterns, and selects names that end in a target. Here the first
rule that matches decides. Each pair of a target and a key of a table becomes a rule, unless both
cannot match the same name, or match no name of the model, if its names are given.

Source: peft 0.21.2, tuners/lora/config.py; tuners/tuners_utils.py, `check_target_module_exists`;
utils/other.py, `get_pattern_key`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from itertools import takewhile
from operator import ne
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

from lora_inject.core.spec.config import Config
from lora_inject.core.spec.inventory import LINEAR_KINDS, Inventory
from lora_inject.core.spec.names import Below, canonical, first_number, joined, leaf
from lora_inject.core.spec.patterns import checked_regex, matching
from lora_inject.core.spec.resolve import linear_layers
from lora_inject.core.spec.yaml import read_text
from lora_inject.errors import ConfigError, user_path
from lora_inject.formats.model_facts import expert_names

_MERGE = "Train it with PEFT, merge it there and start from that model"
_REFUSED = {
    "alora_invocation_tokens": ("an activated LoRA, which depends on the tokens", _MERGE),
    "arrow_config": ("a router over several adapters", "Choose adapters by routed(model, rows)"),
    "corda_config": ("of an init that reads data", "Leave it out; init: pissa starts from W"),
    "eva_config": ("of an init that reads data", "Leave it out; init: pissa starts from W"),
    "kasa_config": ("KaSA, which changes the base", _MERGE),
    "layer_replication": ("a model with repeated layers", "Build that model, then adapt it"),
    "loftq_config": ("of an init that changes the base", "Leave it out; init: pissa is near"),
    "lora_ga_config": ("of an init that reads gradients", "Leave it out; init: pissa is near"),
    "megatron_config": ("Megatron's parallel layers", "Adapt plain linear layers"),
    "monteclora_config": ("MonteCLoRA", _MERGE),
    "use_bdlora": ("block-diagonal LoRA", _MERGE),
    "use_qalora": ("QALoRA, with pooled inputs", _MERGE),
    "velora_config": ("VeLoRA, a backward pass of its own", "Leave it out"),
}
"""Refused fields: what they request, and the remedy. Empty values are accepted."""

_NO_MEANING = {
    *("auto_mapping", "base_model_name_or_path", "peft_version", "revision"),  # about the file
    *("fan_in_fan_out", "inference_mode"),  # known from the layer; see train_only
    *("megatron_core", "qalora_group_size"),  # options of fields that are refused above
}
_INITS = {"true": "kaiming", "gaussian": "gaussian", "pissa": "pissa", "olora": "olora"}
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Task to the names that PEFT adds to modules_to_save (peft_model.py)."""


_Regex = Annotated[StrictStr, AfterValidator(checked_regex)]
_Rank = Annotated[StrictInt, Field(ge=1)]
_Alpha = Annotated[StrictFloat, Field(gt=0)]
_Rows = list[Annotated[StrictInt, Field(ge=0)]]
_TRUTH, _NAMES, _SOME = "True or False", "a list of names", "a list of names, or a regex"


class _Lora(BaseModel):
    """The translated fields, with PEFT's defaults; the description says which values are valid."""

    model_config = ConfigDict(defer_build=True)  # few processes read one

    peft_type: StrictStr = Field("LORA", description="a name")
    task_type: StrictStr | None = Field(None, description="a name")
    r: _Rank = Field(8, description="a whole number from 1")
    lora_alpha: _Alpha = Field(8, description="a number above 0")
    lora_dropout: StrictFloat = Field(0.0, ge=0, lt=1, description="a number from 0 to below 1")
    use_rslora: StrictBool = Field(False, description=_TRUTH)
    use_dora: StrictBool = Field(False, description=_TRUTH)
    lora_bias: StrictBool = Field(False, description=_TRUTH)
    ensure_weight_tying: StrictBool = Field(False, description=_TRUTH)  # ties always hold here
    bias: Literal["none", "all", "lora_only"] = Field("none", description="none, all or lora_only")
    init_lora_weights: StrictBool | StrictStr = Field(True, description="True, or a name")
    target_modules: _Regex | list[StrictStr] | None = Field(None, description=_SOME)
    target_parameters: list[StrictStr] = Field([], description=_NAMES)
    exclude_modules: _Regex | list[StrictStr] = Field([], description=_SOME)
    modules_to_save: list[StrictStr] = Field([], description=_NAMES)
    layers_pattern: _Regex | list[_Regex] = Field([], description="a name, or a list of names")
    layers_to_transform: StrictInt | list[StrictInt] = Field([], description="a list of numbers")
    rank_pattern: dict[_Regex, _Rank] = Field({}, description="a dict from names to ranks")
    alpha_pattern: dict[_Regex, _Alpha] = Field(
        {}, description="a dict from names to alphas, which are above 0"
    )
    trainable_token_indices: _Rows | dict[StrictStr, _Rows] = Field(
        [], description="a list of rows, or a dict from names to such lists"
    )
    runtime_config: dict[str, Any] = Field({}, description="a dict")


FIELDS = frozenset(_REFUSED) | _NO_MEANING | frozenset(_Lora.model_fields)
"""All known fields of PEFT's LoraConfig."""


def from_peft(config: Any, *, inventory: Inventory | None = None, model: Any = None) -> Config:
    """Translate a `LoraConfig`, field by field; PEFT is not imported.

    Fields about training or files are ignored. A name in `target_modules` that the model does not
    have is an error when the config is used.

    Args:
        config: A `LoraConfig`, its plain data, or the path of an adapter_config.json or of the
            folder that holds it.
        inventory: The names of the model (`inject` gives them): rules of `rank_pattern` and
            `alpha_pattern` that would match nothing are left out then.
        model: The model itself (`inject` gives it): names that PEFT reads as those of experts
            become its parameters.

    Raises:
        ConfigError: A field cannot be translated, or the file cannot be read.

    Examples:
        >>> lora = {"r": 16, "target_modules": ["q", "v"], "rank_pattern": {"v": 2}}
        >>> config = from_peft(lora | {"modules_to_save": ["lm_head"]})
        >>> config.to_dict()["targets"], config.rank, config.train
        ([{'match': 'v', 'rank': 2}, 'q'], 16, ('[^.]*lm_head',))
    """
    asked, fields = _fields_of(config)
    lora = _read(fields, asked)
    saved = _saved(lora)
    train = [f"[^.]*{name}" for name in saved]  # PEFT matches the end of a name, without a dot
    exclude = _excluded(lora, saved)
    if inventory is not None:
        _check_saved(train, inventory, asked)
    if inventory is not None and model is not None:
        lora = _with_experts(lora, inventory, expert_names(model), asked)
    ours = {
        "rank": lora.r,
        "alpha": lora.lora_alpha,
        "dropout": lora.lora_dropout,
        "init": _init(lora.init_lora_weights, asked),
        "scaling": "rslora" if lora.use_rslora else "standard",
        "variant": "dora" if lora.use_dora else "lora",
        "lora_bias": lora.lora_bias,
        "bias": "adapted" if lora.bias == "lora_only" else lora.bias,
        "train": train,
        "exclude": exclude,
        "tokens": _tokens(lora.trainable_token_indices, inventory, asked),
        "targets": _Rules(lora, inventory, asked).rules(exclude, saved),
    }
    return Config.from_dict(ours)


def _saved(lora: _Lora) -> list[str]:
    """Return patterns of the modules that train in full, with those that a task adds."""
    heads = _HEADS.get(lora.task_type or "", ())
    saved = [re.escape(name) for name in lora.modules_to_save if name not in heads]
    if len(heads) > 1:  # a model has one of them
        return [*saved, f"({'|'.join(heads)})"]
    return [*saved, *heads]


def _excluded(lora: _Lora, saved: Iterable[str]) -> list[str]:
    """Return patterns of the names that are not adapted."""
    if isinstance(lora.exclude_modules, str):
        exclude = [_from_start(lora.exclude_modules)]
    else:
        exclude = [re.escape(name) for name in sorted(lora.exclude_modules)]
    if isinstance(lora.target_modules, str):
        exclude += saved  # not adapted; here PEFT matches whole segments
    return exclude


def config_of(config: Any, inventory: Inventory | None = None, model: Any = None) -> Config:
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


def _fields_of(config: Any) -> tuple[str, dict[str, Any]]:
    """Return the config's name in messages, and its fields as plain data."""
    if isinstance(config, str | PathLike):
        return f"from_peft '{config}'", _fields_in(user_path("from_peft", config, ConfigError))
    if isinstance(config, Mapping):
        return "from_peft", dict(config)
    if not is_of_peft(config):
        problem = f"a value of type {type(config).__name__}"
        raise ConfigError("from_peft", problem, "Give a LoraConfig, a dict, or a path")
    if getattr(config, "_custom_modules", None):
        problem = "custom layers are registered in it"
        raise ConfigError("from_peft", problem, "Register a kind of layer: register_kind")
    return f"from_peft({type(config).__name__})", config.to_dict()


def _fields_in(path: Path) -> dict[str, Any]:
    file = path / "adapter_config.json" if path.is_dir() else path
    asked, remedy = f"from_peft '{file}'", "Give an adapter_config.json"
    try:
        data = json.loads(read_text(file, asked, remedy))
    except (ValueError, RecursionError) as error:
        raise ConfigError(asked, str(error), remedy) from None
    if not isinstance(data, dict):
        raise ConfigError(asked, "it is not a table of fields", "Check the path")
    return data


def _error(asked: str, field: str, problem: str, remedy: str) -> ConfigError:
    return ConfigError(f"{asked}, '{field}'", problem, remedy)


def _read(fields: Mapping[str, Any], asked: str) -> _Lora:
    """Return the translated fields; refuse other fields that are set."""
    plain = {k: v.value if isinstance(v, Enum) else v for k, v in fields.items() if v is not None}
    kind = plain.get("peft_type", "LORA")
    if kind != "LORA":
        remedy = "Only LoRA and its variants are supported"
        raise _error(asked, "peft_type", f"it is {kind!r}", remedy)
    try:
        lora = _Lora.model_validate({k: v for k, v in plain.items() if k in _Lora.model_fields})
    except ValidationError as error:
        raise _invalid(plain, error, asked) from None
    _refuse_others(plain, asked)
    if lora.runtime_config.get("ephemeral_gpu_offload"):
        problem = "ephemeral_gpu_offload is not supported"
        raise _error(asked, "runtime_config", problem, "Leave it out")
    return lora


def _invalid(fields: Mapping[str, Any], error: ValidationError, asked: str) -> ConfigError:
    """Return the error for the first invalid value, a pattern's before others."""
    faults = error.errors()
    fault = next((fault for fault in faults if fault["type"] == "value_error"), faults[0])
    name = str(fault["loc"][0])
    if fault["type"] == "value_error":
        problem, remedy = fault["ctx"]["error"].args
    else:
        wanted = _Lora.model_fields[name].description
        problem, remedy = f"{fields[name]!r} is not {wanted}", f"Give {wanted}"
    return _error(asked, name, problem, remedy)


def _refuse_others(fields: Mapping[str, Any], asked: str) -> None:
    """Refuse fields that are set and not translated."""
    for name, value in fields.items():
        if value and name in _REFUSED:
            what, remedy = _REFUSED[name]
            raise _error(asked, name, f"it is not supported: {what}", remedy)
        if value and name not in FIELDS:
            remedy = "Leave it out if it changes nothing"
            raise _error(asked, str(name), "this field of PEFT is not known here", remedy)


def _with_experts(
    lora: _Lora, inventory: Inventory, new_names: Mapping[str, str], asked: str
) -> _Lora:
    """Replace targets that PEFT, on transformers 5, reads as experts by parameters.

    `new_names` has the parameter that holds the experts of each old name: `gate_up_proj` for
    `gate_proj` and for `up_proj`. A parameter that holds several gets their ranks and alphas added.

    Source: peft/utils/transformers_weight_conversion.py, `_convert_peft_config_moe`.
    """
    has_experts = any(candidate.experts for candidate in inventory.candidates)
    if not new_names or not has_experts:
        return lora
    targets = lora.target_modules or []
    if isinstance(targets, str):
        targets = _ends_of(targets, inventory, new_names, asked)
    old = {leaf(name) for name in targets} & new_names.keys()
    ranks, alphas = dict(lora.rank_pattern), dict(lora.alpha_pattern)
    for new in {new_names[name] for name in old}:
        n_parts = _n_parts(new, old, new_names, asked)
        if n_parts > 1:
            regex = rf".*\.{re.escape(new)}"
            ranks[regex], alphas[regex] = lora.r * n_parts, lora.lora_alpha * n_parts
    update = {
        "target_modules": [name for name in targets if leaf(name) not in old],
        "target_parameters": [*lora.target_parameters, *(new_names[name] for name in old)],
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    return lora.model_copy(update=update) if old else lora


def _n_parts(new: str, old: set[str], new_names: Mapping[str, str], asked: str) -> int:
    """Return of how many names a parameter is; refuse some of them targeted without the others."""
    parts = {name for name, other in new_names.items() if other == new}
    if missing := parts - old:
        problem = f"{min(missing)!r} is missing, and is one tensor with {min(parts & old)!r}"
        raise _error(asked, "target_modules", problem, "Name both, or neither")
    return len(parts)


def _ends_of(
    given: str, inventory: Inventory, new_names: Mapping[str, str], asked: str
) -> list[str]:
    """Return the ends of names that PEFT uses for all-linear, or for a regex, on such a model."""
    if given.lower() == "all-linear":
        return list(dict.fromkeys([*map(leaf, linear_layers(inventory)), *new_names]))
    names = list(inventory.modules)
    for stack in (candidate for candidate in inventory.candidates if candidate.experts):
        names += [joined(stack.owner, o) for o, n in new_names.items() if n == leaf(stack.name)]
    taken = dict.fromkeys(matching(_from_start(given), names, asked=asked))
    ends = dict.fromkeys(leaf(name) for name in taken)
    for name in names:
        if leaf(name) in ends and name not in taken:
            problem = f"of a regex PEFT takes ends of names on this model, so '{name}' too"
            raise _error(asked, "target_modules", problem, "Give target_modules as a list")
    return list(ends)


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
    modules = inventory.modules
    for pattern in train:
        below = Below(matching(pattern, modules, asked=asked))
        for name in matching(pattern, inventory.listed, asked=asked):
            if name not in below:
                problem = f"'{name}' is a parameter, and PEFT saves modules only"
                raise _error(asked, "modules_to_save", problem, "Name the module that it is in")


def _tokens(given: Any, inventory: Inventory | None, asked: str) -> dict[str, list[int]]:
    if isinstance(given, dict):
        return {re.escape(name): ids for name, ids in given.items()}
    here = [c.name for c in inventory.candidates if c.kind == "embedding"] if inventory else []
    if given and len(here) != 1:
        there = f", and there are {len(here)}" if inventory else ""
        remedy = "Give a dict, such as {'embed_tokens': [32000, 32001]}"
        problem = f"it does not name an embedding{there}"
        raise _error(asked, "trainable_token_indices", problem, remedy)
    return {re.escape(here[0]): given} if given else {}


# Rules ------------------------------------------------------------------------------------------

_LITERAL = re.compile(r"\^?(?:[\w-]|\\?\.)+")


def _from_start(given: str) -> str:
    """Return a pattern for a regex of PEFT's for whole names, whose flags hold for itself only."""
    first = re.match(r"(?:\(\?[imsx]+\))*", given)
    end = first.end() if first else 0
    flags = "".join(sorted({*given[:end]} - {*"(?)"}))
    return f"^(?{flags}:{given[end:]}" + ("\n)" if "x" in flags else ")")  # ends a comment


class _Pattern(NamedTuple):
    """A regex for the end of a name; `literal` is the name that it spells, or None.

    A target that is the `whole` name of a module is adapted in every layer.
    """

    regex: str
    literal: str | None = None
    whole: bool = False
    parameter: bool = False

    @classmethod
    def of_key(cls, key: str) -> _Pattern:
        """Return a key of rank_pattern or alpha_pattern."""
        if _LITERAL.fullmatch(key):
            return cls(key, key.removeprefix("^").replace("\\", ""), key.startswith("^"))
        return cls(key)

    def covers(self, other: _Pattern) -> bool:
        """Return whether this pattern surely matches every name that the other matches."""
        spelled = self.literal and other.literal and not self.whole
        return bool(spelled) and f".{other.literal}".endswith(f".{self.literal}")

    def met(self, other: _Pattern) -> _Pattern | None:
        """Return a pattern for the names that both match; None if there are none."""
        if other is _ALL or self.regex == other.regex:
            return self
        if self.literal is None or other.literal is None:
            return _Pattern(rf"^(?=(?:.*\.)?(?:{self.regex})$)(?:.*\.)?(?:{other.regex})")
        if self.literal == other.literal:
            return other if other.whole else self
        longer, shorter = sorted((self, other), key=lambda p: -len(p.literal or ""))
        return longer if shorter.covers(longer) else None


_ALL = _Pattern("all-linear")


class _Rules:
    """The rules of a LoraConfig, with the names of a model or without."""

    def __init__(self, lora: _Lora, inventory: Inventory | None, asked: str) -> None:
        self.lora, self.inventory, self.asked = lora, inventory, asked
        self.tables = dict[str, dict[str, Any]](rank=lora.rank_pattern, alpha=lora.alpha_pattern)
        self.keys = {key: _Pattern.of_key(key) for table in self.tables.values() for key in table}
        given = lora.layers_to_transform
        self.layers = [given] if isinstance(given, int) else given
        self.targets = self._targets()
        self.kinds: dict[str, str] = {}
        self.left: dict[str, None] = {}  # names that no rule has taken

    def rules(self, exclude: Iterable[str], saved: Iterable[str]) -> list[dict[str, Any]]:
        """Return the rules in order; the patterns match names that are not targeted."""
        if self.inventory is not None:
            self._look(self.inventory, exclude, saved)
            self._check_left()
        rules: list[dict[str, Any]] = []
        for keys in self._combinations():
            values = {name: self.tables[name][key] for name, key in keys.items()}
            for target in self.targets:
                pattern: _Pattern | None = None if self._covered(keys, target) else target
                for key in dict.fromkeys(keys.values()):
                    pattern = pattern and self.keys[key].met(pattern)
                if pattern is not None:
                    rules += self._rule(pattern, target, values)
        if self.left and self.layers and not rules:
            some = min(self.left)
            none = f"no targeted module is in a layer of {self.layers}, such as '{some}'"
            raise _error(self.asked, "layers_to_transform", none, "Layers are counted from 0")
        return rules

    def _targets(self) -> list[_Pattern]:
        """Return a pattern for each target; names that end in another target are left out."""
        given, parameters = self.lora.target_modules, self.lora.target_parameters
        if given is None and not parameters:
            problem = "it is missing: PEFT has a list of names for each type of model"
            remedy = "Give target_modules, such as 'all-linear'"
            raise _error(self.asked, "target_modules", problem, remedy)
        if isinstance(given, str):
            regex = _ALL if given.lower() == "all-linear" else _Pattern(_from_start(given))
            return [regex, *self._named({*parameters})]
        return self._named({*parameters, *(given or ())})

    def _named(self, names: set[str]) -> list[_Pattern]:
        # PEFT looks at no layer number where a target is a whole name.
        whole = self.inventory.modules if self.inventory and self.layers else ()
        targets = []
        for name in sorted(names):
            if name in whole:
                targets.append(_Pattern(f"^{re.escape(name)}", name, whole=True))
            if not any(name.endswith(f".{other}") for other in names):
                is_parameter = name in self.lora.target_parameters
                targets.append(_Pattern(re.escape(name), name, parameter=is_parameter))
        return targets

    def _combinations(self) -> Iterator[dict[str, str]]:
        """Yield the keys that give a rule its numbers, in the order of each table.

        For a name that both keys match, each key must be the first match in its table.
        """
        ranks, alphas = ([*table, None] for table in self.tables.values())
        at, alpha_at = ({key: i for i, key in enumerate(keys)} for keys in (ranks, alphas))
        for rank in ranks:
            for alpha in alphas:
                first = at.get(alpha, at[rank]) >= at[rank]
                if first and alpha_at.get(rank, alpha_at[alpha]) >= alpha_at[alpha]:
                    pairs = {"rank": rank, "alpha": alpha}
                    yield {name: key for name, key in pairs.items() if key is not None}

    def _covered(self, keys: Mapping[str, str], target: _Pattern) -> bool:
        """Return whether an earlier key gives the number of every name that a target matches."""
        return any(
            self.keys[key].covers(target)
            for name, table in self.tables.items()
            for key in takewhile(partial(ne, keys.get(name)), table)
        )

    def _rule(
        self, pattern: _Pattern, target: _Pattern, values: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Return the rules for a pattern, with their numbers.

        1. Without a model it is one rule, for linear layers if it narrows `all-linear`.
        2. A rule takes the names that it matches and no earlier one took.
        3. It is one for each kind if it narrows `all-linear`, or where the pattern matches modules
           and parameters, of which the target means one.
        4. A rule that takes nothing is left out, unless its pattern matches no name at all: then
           matching raises with the nearest names.
        """
        rule = {"match": pattern.regex, **values, **self._in_layers(pattern, target)}
        narrows = target is _ALL and pattern is not _ALL
        if self.inventory is None:
            return [rule | {"kind": "linear"}] if narrows else [rule]
        mixed = target is not _ALL and self._matches_both(pattern)
        names = self._take(rule, pattern, target, mixed=mixed)
        if names and (narrows or mixed):
            kinds = dict.fromkeys(map(self.kinds.__getitem__, names))
            return [rule | {"kind": kind} for kind in kinds]
        if names or self._is_unknown(pattern, values):
            return [rule]
        return []

    def _is_unknown(self, pattern: _Pattern, values: Mapping[str, Any]) -> bool:
        """Whether a target, without numbers of its own, matches no name of the model at all."""
        return pattern is not _ALL and not values and not self._known_by(pattern)

    def _in_layers(self, pattern: _Pattern, target: _Pattern) -> dict[str, Any]:
        """Return what confines a rule to layers; as in PEFT none of parameters and whole names."""
        if not self.layers or target.parameter or target.whole:
            return {}
        if names := self.lora.layers_pattern:
            return {"match": _in_layers(pattern.regex, names, self.layers)}
        return {"layers": self.layers}

    def _matches_both(self, pattern: _Pattern) -> bool:
        """Whether a pattern matches modules and parameters."""
        return len({self._is_tensor(name) for name in self._known_by(pattern)}) == 2

    def _take(
        self, rule: Mapping[str, Any], pattern: _Pattern, target: _Pattern, *, mixed: bool
    ) -> list[str]:
        """Take the names that a rule matches out of those that are left."""
        names = list(self.left) if pattern is _ALL else self._matching(rule["match"], self.left)
        if "layers" in rule:
            names = [name for name in names if first_number(name) in self.layers]
        if target is _ALL:
            names = [name for name in names if self.kinds[name] in LINEAR_KINDS]
        if mixed:
            names = [name for name in names if self._is_tensor(name) == target.parameter]
        for name in names:
            del self.left[name]
        return names

    def _matching(self, regex: str, names: Iterable[str]) -> list[str]:
        return matching(regex, names, asked=f"{self.asked}, {regex!r}")

    # With the names of the model

    def _look(self, inventory: Inventory, exclude: Iterable[str], saved: Iterable[str]) -> None:
        """Find the names that may be targeted, and refuse those that PEFT treats differently."""
        self.kinds = self._known(inventory)
        targeted = self._targeted()
        if self.lora.ensure_weight_tying:
            self._refuse_tied(inventory, targeted)
        others = [*self.kinds, *inventory.others]
        excluded = self._matching_any(exclude, others)
        trained = Below(self._matching_any(saved, others))
        below_excluded = Below(excluded)
        for name, as_parameter in targeted.items():
            if not as_parameter and (name in trained or name in excluded):
                continue
            if name in below_excluded:
                problem = (
                    f"PEFT adapts '{name}', below a module that is excluded; here it would not"
                )
                remedy = "Exclude by a regex for full names, such as '.*vision_tower.*'"
                raise _error(self.asked, "exclude_modules", problem, remedy)
            self.left[name] = None
        if targeted and not self.left:
            problem = f"all {len(targeted)} targeted layers are excluded, or are modules_to_save"
            raise _error(self.asked, "target_modules", problem, "Target some others")

    def _targeted(self) -> dict[str, bool]:
        """Return the names that a target matches, and whether one of them means a parameter."""
        targeted: dict[str, bool] = {}
        for target in self.targets:
            for name in self._matched(target):
                targeted[name] = targeted.get(name, False) or target.parameter
        return targeted

    def _matching_any(self, regexes: Iterable[str], names: Sequence[str]) -> set[str]:
        return {name for regex in regexes for name in self._matching(regex, names)}

    def _refuse_tied(self, inventory: Inventory, targeted: Collection[str]) -> None:
        tied = {name for c in inventory.candidates if c.tied for name in (c.name, *c.aliases)}
        if both := tied.intersection(targeted):
            problem = f"'{min(both)}' is tied, and adapters here are not shared between tied layers"
            raise _error(self.asked, "ensure_weight_tying", problem, "Leave it out of the targets")

    def _known(self, inventory: Inventory) -> dict[str, str]:
        """Return name to kind of everything that may be targeted."""
        names, everything = dict[str, str](), _ALL in self.targets
        linear = {*linear_layers(inventory)}
        for c in inventory.candidates:
            if not everything or c.kind == "parameter" or c.name in linear:
                names |= dict.fromkeys((c.name, *c.aliases), c.kind)
            if not everything and c.kind != "parameter":
                names[canonical(c.weight)] = "parameter"
        return names

    def _matched(self, target: _Pattern) -> list[str]:
        if target is _ALL:
            return [name for name, kind in self.kinds.items() if kind in LINEAR_KINDS]
        known = self._known_by(target)
        meant = [name for name in known if self._is_tensor(name) == target.parameter]
        if known and not meant and not target.parameter:
            words = f"'{known[0]}' is a parameter, and PEFT adapts modules by target_modules"
            raise _error(self.asked, "target_modules", words, "Name it in target_parameters")
        return meant

    def _known_by(self, pattern: _Pattern) -> list[str]:
        return self._matching(pattern.regex, self.kinds)

    def _is_tensor(self, name: str) -> bool:
        """Whether `target_parameters` means a name, and not `target_modules`."""
        return self.kinds[name] == "parameter"

    def _check_left(self) -> None:
        """Refuse keys that match no target, and names in which PEFT finds another layer number."""
        for table, keys in self.tables.items():
            for key in keys:
                if not self._matching(key, self.left):
                    problem = f"the key {key!r} matches none of the targeted modules"
                    raise _error(
                        self.asked, f"{table}_pattern", problem, "Remove it, or correct it"
                    )
        for name in self.left if self.layers and not self.lora.layers_pattern else ():
            number = re.match(r".*?\.[^.]*\.(\d+)\.", name)
            theirs, ours = int(number[1]) if number else None, first_number(name)
            if theirs != ours and {theirs, ours} & set(self.layers):
                problem = f"for PEFT the layer of '{name}' is {theirs}, for a rule here {ours}"
                remedy = "Give layers_pattern, such as 'layers'"
                raise _error(self.asked, "layers_to_transform", problem, remedy)


def _in_layers(regex: str, names: str | Iterable[str], layers: Iterable[int]) -> str:
    """Return a pattern for names whose first number after one of some names is one of `layers`."""
    several = [names] if isinstance(names, str) else list(names)
    numbers = "|".join(map(str, layers))
    # As in PEFT, the first number after the first of the names decides. The group is atomic, so no
    # other number is tried.
    choices, before = [], ""
    for name in several:
        place = rf"(?:.*?\.)??{name}\.(?=\d+\.)"
        choices.append(rf"{before}(?>{place})(?:{numbers})\.")
        before += rf"(?!{place})"
    return rf"^(?={'|'.join(choices)})(?:.*\.)?(?:{regex})"
