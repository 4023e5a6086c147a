"""Translate PEFT's LoraConfig to a config of this package; refuse other fields by name.

PEFT looks numbers up in tables of patterns, and selects names that end in a target; here the first
rule that matches decides. Each pair of a target and a key of a table becomes a rule, unless they
cannot match a common name, or, with the names of the model given, match none.

Source: peft 0.21.2, tuners/lora/config.py; tuners/tuners_utils.py, `check_target_module_exists`;
utils/other.py, `get_pattern_key`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from lora_inject.errors import ConfigError
from lora_inject.spec.inventory import Inventory
from lora_inject.spec.names import Below, canonical, first_number, matching, parent, regex_problem

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
"""Refused fields: what they ask for, and the remedy. Empty values are accepted."""

_NO_MEANING = {
    *("auto_mapping", "base_model_name_or_path", "peft_version", "revision"),  # about the file
    *("fan_in_fan_out", "inference_mode"),  # known from the layer; see train_only
    *("megatron_core", "qalora_group_size"),  # parts of what is refused above
    "ensure_weight_tying",  # ties always hold here
}
_TRANSLATED = {
    *("alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "modules_to_save"),
    *("peft_type", "r", "rank_pattern", "runtime_config", "target_modules", "target_parameters"),
    *("task_type", "trainable_token_indices", "use_dora", "use_rslora"),
}
FIELDS = frozenset(_REFUSED) | _NO_MEANING | _TRANSLATED
"""All known fields of PEFT's LoraConfig."""

_INITS = {"true": "kaiming", "gaussian": "gaussian", "pissa": "pissa", "olora": "olora"}
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Task to the names that PEFT adds to modules_to_save (peft_model.py)."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _all(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list | tuple | set | frozenset) and all(map(check, v))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _names_or_regex(value: Any) -> bool:
    return _is_text(value) or _all(_is_text)(value)


def _table(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: (
        isinstance(v, Mapping) and all(map(_is_text, v)) and all(map(check, v.values()))
    )


_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda v: _is_whole(v) and v >= 1, "a whole number from 1"),
    "lora_alpha": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "lora_dropout": (_is_number, "a number"),
    "target_modules": (_names_or_regex, "a list of names, or a regex"),
    "target_parameters": (_all(_is_text), "a list of names"),
    "exclude_modules": (_names_or_regex, "a list of names, or a regex"),
    "modules_to_save": (_all(_is_text), "a list of names"),
    "layers_pattern": (_names_or_regex, "a name, or a list of names"),
    "layers_to_transform": (lambda v: _is_whole(v) or _all(_is_whole)(v), "a list of numbers"),
    "rank_pattern": (_table(lambda v: _is_whole(v) and v >= 1), "a dict from names to ranks"),
    "alpha_pattern": (_table(_is_number), "a dict from names to alphas"),
    "trainable_token_indices": (
        lambda v: _all(_is_whole)(v) or _table(_all(_is_whole))(v),
        "a list of rows, or a dict from names to such lists",
    ),
    "runtime_config": (lambda v: isinstance(v, Mapping), "a dict"),
}
"""Field to what its value must be, where there is one."""


def translated(
    fields: Mapping[str, Any],
    inventory: Inventory | None = None,
    asked: str = "from_peft",
    expert_names: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    r"""Return the fields of a LoraConfig as a config of this package, plain data.

    Args:
        fields: Plain data, as in adapter_config.json.
        inventory: The names of the model; rules that would match nothing are left out.
        asked: Name of the action in messages.
        expert_names: Ends of target names that PEFT takes for experts of this model, to parameters.

    Raises:
        ConfigError: A field cannot be translated.

    Examples:
        >>> found = translated({"r": 4, "target_modules": ["q", "v"], "rank_pattern": {"v": 2}})
        >>> found["targets"]
        [{'match': 'v', 'rank': 2}, {'match': 'q'}]
    """
    _refuse(fields, asked)
    fields = _with_experts(fields, inventory, expert_names, asked)
    found: dict[str, Any] = {
        "rank": fields.get("r", 8),
        "alpha": fields.get("lora_alpha", 8),
        "dropout": fields.get("lora_dropout") or 0.0,
        "init": _init(fields.get("init_lora_weights", True), asked),
    }
    if fields.get("use_rslora"):
        found["scaling"] = "rslora"
    if fields.get("use_dora"):
        found["variant"] = "dora"
    if fields.get("lora_bias"):
        found["lora_bias"] = True
    bias = {"none": "none", "all": "all", "lora_only": "adapted"}.get(fields.get("bias", "none"))
    if bias is None:
        raise _error(asked, "bias", f"it is {fields['bias']!r}", "Give none, all or lora_only")
    if bias != "none":
        found["bias"] = bias
    heads = _HEADS.get(str(fields.get("task_type")), ())
    saved = [re.escape(n) for n in fields.get("modules_to_save") or () if n not in heads]
    saved += [f"({'|'.join(heads)})"] if len(heads) > 1 else heads
    train = [f"[^.]*{name}" for name in saved]  # PEFT asks for the end of a name, without a dot
    if inventory is not None:
        _check_saved(train, inventory, asked)
    exclude = _exclude(fields)
    if _takes_all(fields):
        exclude += saved  # not adapted, and here PEFT asks for whole segments
    tokens = _tokens(fields.get("trainable_token_indices"), inventory, asked)
    found |= {"train": train, "exclude": exclude, "tokens": tokens}
    rules = _Rules(fields, inventory, asked, exclude, saved)
    found["targets"] = list(rules.rules())
    if rules.left and rules.layers is not None and not found["targets"]:
        none = f"no targeted module lies in a layer of {rules.layers}, such as '{min(rules.left)}'"
        raise _error(asked, "layers_to_transform", none, "Layers are counted from 0")
    return {key: value for key, value in found.items() if value or key in ("dropout", "targets")}


def _error(asked: str, field: str, found: str, remedy: str) -> ConfigError:
    return ConfigError(f"{asked}, '{field}'", found, remedy)


def _refuse(fields: Mapping[str, Any], asked: str) -> None:
    kind = fields.get("peft_type") or "LORA"
    if kind != "LORA":
        raise _error(
            asked, "peft_type", f"it is {kind!r}", "Only LoRA and its variants are supported"
        )
    _check_types(fields, asked)
    for name, (what, remedy) in _REFUSED.items():
        if fields.get(name):
            raise _error(asked, name, f"it is not supported: {what}", remedy)
    for name in fields:
        if name not in FIELDS and fields[name]:
            remedy = "Leave it out if it changes nothing"
            raise _error(asked, str(name), "this field of PEFT is not known here", remedy)
    if (fields.get("runtime_config") or {}).get("ephemeral_gpu_offload"):
        raise _error(
            asked, "runtime_config", "ephemeral_gpu_offload is not supported", "Leave it out"
        )


def _check_types(fields: Mapping[str, Any], asked: str) -> None:
    for name, (is_one, wanted) in _TYPES.items():
        value = fields.get(name)
        if value is not None and not is_one(value):
            raise _error(asked, name, f"{value!r} is not {wanted}", f"Give {wanted}")
        regexes = isinstance(value, Mapping) or name == "layers_pattern"
        for key in [value] if isinstance(value, str) else (regexes and value) or ():
            if problem := name != "trainable_token_indices" and regex_problem(key):
                found = f"{key!r} is not a regex: {problem}"
                raise _error(asked, name, found, "Escape its brackets; a literal dot is '\\.'")


def _with_experts(
    fields: Mapping[str, Any],
    inventory: Inventory | None,
    new_names: Mapping[str, str],
    asked: str,
) -> Mapping[str, Any]:
    """Replace targets that PEFT, on transformers 5, takes for experts by parameters.

    Source: peft/utils/transformers_weight_conversion.py, `_convert_peft_config_moe`.
    """
    given = fields.get("target_modules") or ()
    stacks = {c.owner for c in inventory.candidates if c.experts} if inventory else set()
    if not new_names or not stacks:
        return fields
    if isinstance(given, str):
        owners = [o for s in stacks for o in (s, f"{s}.0", parent(s))]
        inside = [f"{owner}.{name}" for owner in owners for name in new_names]
        if given.lower() != "all-linear" and not matching(f"^(?:{given})", inside, asked=asked):
            return fields
        found = f"PEFT takes {given!r} for experts of this model as well, with other ranks"
        remedy = "Give target_modules as a list, and experts in target_parameters"
        raise _error(asked, "target_modules", found, remedy)
    old = {name.rpartition(".")[2] for name in given} & new_names.keys()
    made = dict(fields)
    for key in ("rank_pattern", "alpha_pattern"):
        made[key] = dict(fields.get(key) or {})
    for new in {new_names[name] for name in old}:
        parts = {name for name, other in new_names.items() if other == new}
        if parts - old:
            found = f"{min(parts - old)!r} is missing, and is one tensor with {min(parts & old)!r}"
            raise _error(asked, "target_modules", found, "Name both, or neither")
        if len(parts) > 1:
            regex = rf".*\.{re.escape(new)}"
            made["rank_pattern"][regex] = fields.get("r", 8) * len(parts)
            made["alpha_pattern"][regex] = fields.get("lora_alpha", 8) * len(parts)
    made["target_modules"] = [n for n in given if n.rpartition(".")[2] not in old]
    parameters = {*(fields.get("target_parameters") or ()), *(new_names[name] for name in old)}
    made["target_parameters"] = sorted(parameters)
    return made


def _init(init: Any, asked: str) -> str:
    name = re.sub(r"^pissa_niter_\d+$", "pissa", str(True if init is None else init).lower())
    if name not in _INITS:
        found = f"there is no init {init!r}"
        if name == "false":
            found = "it makes B random, so the adapter would not start at zero"
        raise _error(asked, "init_lora_weights", found, "Choose True, gaussian, pissa or olora")
    return _INITS[name]


def _check_saved(train: Iterable[str], inventory: Inventory, asked: str) -> None:
    """Refuse what names a parameter, which trains here and which PEFT passes over."""
    for pattern in train:
        below = Below(matching(pattern, inventory.modules, asked=asked))
        for name in matching(pattern, inventory.listed, asked=asked):
            if name not in below:
                found = f"'{name}' is a parameter, and PEFT saves modules only"
                raise _error(asked, "modules_to_save", found, "Name the module that it is in")


def _takes_all(fields: Mapping[str, Any]) -> bool:
    return isinstance(fields.get("target_modules"), str)


def _exclude(fields: Mapping[str, Any]) -> list[str]:
    excluded = fields.get("exclude_modules")
    if isinstance(excluded, str):
        return [f"^(?:{excluded})"]
    return [re.escape(name) for name in sorted(excluded or ())]


def _tokens(given: Any, inventory: Inventory | None, asked: str) -> dict[str, list[int]]:
    if not given:
        return {}
    if isinstance(given, Mapping):
        return {re.escape(name): list(ids) for name, ids in given.items()}
    here = [c.name for c in inventory.candidates if c.kind == "embedding"] if inventory else []
    if len(here) != 1:
        found = f"it does not name an embedding, and there are {len(here)}"
        if inventory is None:
            found = "it does not name an embedding"
        remedy = "Give a dict, such as {'embed_tokens': [32000, 32001]}"
        raise _error(asked, "trainable_token_indices", found, remedy)
    return {re.escape(here[0]): list(given)}


# Rules ------------------------------------------------------------------------------------------

_LITERAL = re.compile(r"\^?(?:[\w-]|\\?\.)+")


class _Pattern(NamedTuple):
    """A regex for the end of a name; `literal` is the name that it spells, or None."""

    regex: str
    literal: str | None = None
    whole: bool = False
    parameter: bool = False

    @classmethod
    def of_key(cls, key: str) -> _Pattern:
        """A key of rank_pattern or alpha_pattern."""
        if _LITERAL.fullmatch(key):
            return cls(key, key.removeprefix("^").replace("\\", ""), key.startswith("^"))
        return cls(key)


def _both(one: _Pattern, two: _Pattern) -> _Pattern | None:
    """Return a pattern for names that both match, None if there are none."""
    if one.regex == two.regex:
        return one
    if one.literal is None or two.literal is None:
        return _Pattern(rf"^(?=(?:.*\.)?(?:{one.regex})$)(?:.*\.)?(?:{two.regex})")
    longer, shorter = (one, two) if len(one.literal) >= len(two.literal) else (two, one)
    if shorter.whole and longer.literal != shorter.literal:
        return None
    ends = f".{longer.literal}".endswith(f".{shorter.literal}")
    same = longer.literal == shorter.literal
    return (shorter if same and shorter.whole else longer) if ends else None


class _Rules:
    """The rules of a LoraConfig."""

    def __init__(
        self,
        fields: Mapping[str, Any],
        inventory: Inventory | None,
        asked: str,
        exclude: Iterable[str],
        saved: Iterable[str],
    ) -> None:
        self.fields, self.inventory, self.asked = fields, inventory, asked
        self.tables = {
            "rank": dict(fields.get("rank_pattern") or {}),
            "alpha": dict(fields.get("alpha_pattern") or {}),
        }
        self.layers = _layers(fields.get("layers_to_transform"))
        self.kinds: dict[str, str] = {}
        self.left: dict[str, None] = {}
        if inventory is not None:
            self._look(inventory, exclude, saved)

    def rules(self) -> Iterator[dict[str, Any]]:
        """Yield the rules in order."""
        targets = list(self._targets())
        for keys in self._combinations():
            values = {name: self.tables[name][key] for name, key in keys.items()}
            for target in targets:
                pattern: _Pattern | None = None if self._covered(keys, target) else target
                for key in dict.fromkeys(keys.values()):
                    pattern = pattern and _met(pattern, _Pattern.of_key(key))
                if pattern is not None:
                    yield from self._rule(pattern, target, values)

    def _covered(self, keys: Mapping[str, str], target: _Pattern) -> bool:
        """Whether an earlier key gives the number of every name that a target matches."""
        for name, table in self.tables.items():
            for key in table:
                if key == keys.get(name):
                    break
                known = _Pattern.of_key(key)
                spelled = known.literal and target.literal and not known.whole
                if spelled and f".{target.literal}".endswith(f".{known.literal}"):
                    return True
        return False

    def _targets(self) -> Iterator[_Pattern]:
        given = self.fields.get("target_modules")
        parameters = self.fields.get("target_parameters") or ()
        if given is None and not parameters:
            found = "it is missing: PEFT has a list of names for each type of model"
            remedy = "Give target_modules, such as 'all-linear'"
            raise _error(self.asked, "target_modules", found, remedy)
        if isinstance(given, str):
            everything = given.lower() == "all-linear"
            yield _ALL if everything else _Pattern(f"^(?:{given})")
            given = ()
        names = {*(given or ()), *parameters}
        for name in sorted(names):
            if not any(name != other and name.endswith(f".{other}") for other in names):
                yield _Pattern(re.escape(name), name, parameter=name in parameters)

    def _combinations(self) -> Iterator[dict[str, str]]:
        """Yield the keys that a rule takes its numbers from, in the order of each table."""
        ranks, alphas = self.tables["rank"], self.tables["alpha"]
        if list(ranks) == list(alphas):
            for key in ranks:
                yield {"rank": key, "alpha": key}
            yield {}
            return
        for rank in (*ranks, None):
            for alpha in (*alphas, None):
                # A name that one of the keys matches has a number in the table that has this key.
                if (alpha is None and rank in alphas) or (rank is None and alpha in ranks):
                    continue
                pairs = {"rank": rank, "alpha": alpha}
                yield {name: key for name, key in pairs.items() if key is not None}

    def _rule(
        self, pattern: _Pattern, target: _Pattern, values: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Yield one rule, or one per kind for `all-linear`; none that matches nothing."""
        rule = {"match": pattern.regex, **values}
        if self.layers is not None and not target.parameter:  # PEFT looks at modules only
            if names := self.fields.get("layers_pattern"):
                rule["match"] = _in_layers(pattern.regex, names, self.layers)
            else:
                rule["layers"] = self.layers
        narrowed = target is _ALL and pattern is not _ALL
        if self.inventory is None:
            yield rule | ({"kind": "linear"} if narrowed else {})
            return
        asked = f"{self.asked}, {pattern.regex!r}"
        whole = pattern is _ALL
        hits = list(self.left) if whole else matching(rule["match"], self.left, asked=asked)
        linear = whole or narrowed
        hits = [
            n for n in hits if self._in_layer(n) and not (linear and self.kinds[n] not in _LINEAR)
        ]
        for name in hits:
            del self.left[name]
        if hits and narrowed:
            yield from (rule | {"kind": kind} for kind in {self.kinds[name]: 0 for name in hits})
        elif hits or not (values or whole or matching(pattern.regex, self.kinds, asked=asked)):
            yield rule  # matches no name: matching raises, with the nearest names

    # With the names of the model

    def _look(self, inventory: Inventory, exclude: Iterable[str], saved: Iterable[str]) -> None:
        """Find the names that may be targeted, and refuse those that PEFT treats differently."""
        self.kinds = self._known(inventory)
        tied = {name for c in inventory.candidates if c.tied for name in (c.name, *c.aliases)}
        if self.fields.get("ensure_weight_tying") and (both := tied.intersection(self._targeted())):
            found = f"'{min(both)}' is tied, and adapters here are not shared between tied layers"
            raise _error(self.asked, "ensure_weight_tying", found, "Leave it out of the targets")
        others = [*self.kinds, *inventory.others]
        gone = {n for p in exclude for n in matching(p, others, asked=self.asked)}
        kept = Below(n for p in saved for n in matching(p, others, asked=self.asked))
        below = Below(gone)
        asked_for = [t.regex for t in self._targets() if t.parameter]
        parameters = {n for r in asked_for for n in matching(r, self.kinds, asked=self.asked)}
        for name in self._targeted():
            if name not in parameters and (name in kept or name in gone):
                continue
            if name in below:
                found = f"PEFT adapts '{name}', below a module that is excluded; here it would not"
                remedy = "Exclude by a regex for full names, such as '.*vision_tower.*'"
                raise _error(self.asked, "exclude_modules", found, remedy)
            self.left[name] = None
        for table, keys in self.tables.items():
            for key in keys:
                if not matching(key, self.left, asked=f"{self.asked}, {key!r}"):
                    found = f"the key {key!r} matches none of the targeted modules"
                    remedy = "Remove it, or correct it"
                    raise _error(self.asked, f"{table}_pattern", found, remedy)
        if self.layers is not None and not self.fields.get("layers_pattern"):
            self._check_layers()

    def _known(self, inventory: Inventory) -> dict[str, str]:
        """Name to kind of everything that may be targeted."""
        everything = _ALL in self._targets()
        names: dict[str, str] = {}
        for c in inventory.candidates:
            wanted = c.kind in (*_LINEAR, "parameter") and c.name not in inventory.heads
            if everything and not wanted:
                continue
            names |= dict.fromkeys((c.name, *c.aliases), c.kind)
            if not everything and c.kind != "parameter":
                names[canonical(c.weight)] = "parameter"
        return names

    def _targeted(self) -> list[str]:
        found: dict[str, None] = {}
        for target in self._targets():
            if target is _ALL:
                names = [name for name, kind in self.kinds.items() if kind in _LINEAR]
            else:
                names = matching(target.regex, self.kinds, asked=self.asked)
            found |= dict.fromkeys(names)
        return list(found)

    def _check_layers(self) -> None:
        """Refuse names in which PEFT finds another layer number than a rule here does."""
        for name in self.left:
            found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
            theirs = int(found[1]) if found else None
            ours = first_number(name)
            if theirs != ours and {theirs, ours} & set(self.layers or ()):
                text = f"for PEFT the layer of '{name}' is {theirs}, for a rule here {ours}"
                remedy = "Give layers_pattern, such as 'layers'"
                raise _error(self.asked, "layers_to_transform", text, remedy)

    def _in_layer(self, name: str) -> bool:
        by_rule = self.layers is not None and not self.fields.get("layers_pattern")
        return not by_rule or first_number(name) in (self.layers or ())


_ALL = _Pattern("all-linear")
_LINEAR = ("linear", "conv1d")


def _met(pattern: _Pattern, key: _Pattern) -> _Pattern | None:
    return key if pattern is _ALL else _both(key, pattern)


def _layers(given: Any) -> list[int] | None:
    if given is None or given == []:
        return None
    return [given] if isinstance(given, int) else list(given)


def _in_layers(regex: str, names: str | Iterable[str], layers: Iterable[int]) -> str:
    """A pattern for names whose first number after one of some names is one of `layers`."""
    several = [names] if isinstance(names, str) else list(names)
    numbers = "|".join(map(str, layers))
    # As in PEFT the first number after the first of the names decides; the group is atomic so that
    # no other is tried.
    found, before = [], ""
    for name in several:
        place = rf"(?:.*?\.)??{name}\.(?=\d+\.)"
        found.append(rf"{before}(?>{place})(?:{numbers})\.")
        before += rf"(?!{place})"
    return rf"^(?={'|'.join(found)})(?:.*\.)?(?:{regex})"
