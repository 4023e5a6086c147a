"""adapter_config.json: what this package writes into it, and what it accepts from others.

Fields that change what the tensors mean (DoRA, an init that changed the base, replicated layers)
are refused by name before anything else is read. Alpha and rank are looked up for each site. The
rest (targets, task, versions) is not needed, since the tensors' names say which sites there are.

Source: peft 0.21.2, tuners/lora/config.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lora_inject.errors import FormatError
from lora_inject.formats.metadata import one_line
from lora_inject.formats.peft.number_patterns import common, pattern_keys, values_of

# The PEFT whose layout the files follow.
PEFT_VERSION = "0.21.2"

_MERGE = "Merge it into the base with PEFT (merge_and_unload) and start from that model"
_AS_LORA = "Convert it with PEFT (peft.convert_to_lora, since 0.19)"
_RESIDUAL = "Convert it with PEFT (save_pretrained(path_initial_model_for_weight_conversion=...))"

# Field: what it is, and what to do. A value that is "empty" (None, False, [], {}) is ignored.
_REFUSED = {
    "alora_invocation_tokens": ("an activated LoRA (aLoRA), active for some tokens only", _MERGE),
    "layer_replication": ("an adapter of a model with replicated layers", _MERGE),
    "use_qalora": ("a QALoRA adapter with pooled inputs", _MERGE),
    "arrow_config": ("an Arrow router over several adapters", "Load the adapters one by one"),
    "kasa_config": ("a KaSA adapter, which changed the base", _MERGE),
    "monteclora_config": ("a MonteCLoRA adapter", _MERGE),
    "velora_config": ("a VeLoRA adapter", _MERGE),
    "use_bdlora": ("a block-diagonal LoRA (BD-LoRA)", _MERGE),
    "megatron_config": ("an adapter of Megatron's parallel layers", "Gather it into a plain one"),
}
_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "true", "false"}
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "target_parameters", "task_type", "trainable_token_indices",
    "use_dora", "use_rslora",
}  # fmt: skip


class Entry(NamedTuple):
    """What the config says of one module or parameter: rank and alpha of its pair in the file."""

    name: str
    kind: str
    rank: int
    alpha: float


def build(
    entries: Iterable[Entry],
    *,
    rslora: bool,
    dora: bool,
    dropout: float,
    bias: str,
    lora_bias: bool,
    tokens: Mapping[str, list[int]],
    modules_to_save: Collection[str],
    target_modules: list[str] | str,
    base_model: str | None,
    task_type: str | None,
) -> dict[str, Any]:
    """Return adapter_config.json as plain data.

    Only fields that PEFT has had since 0.12 are written, newer ones where they are needed: an older
    PEFT warns of a field that it does not know, or fails. `rslora` says that every alpha is meant
    for `alpha / sqrt(rank)`; names are full names, or one regular expression.
    """
    entries = list(entries)
    ranks = {entry.name: entry.rank for entry in entries}
    alphas = {entry.name: _whole(entry.alpha) for entry in entries}
    rank, alpha = common(ranks.values()), common(alphas.values())
    kinds = {entry.kind for entry in entries}
    parameters = sorted(entry.name for entry in entries if entry.kind == "parameter")
    config: dict[str, Any] = {
        "alpha_pattern": pattern_keys(alphas, alpha),
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": bias,
        "fan_in_fan_out": "conv1d" in kinds and "linear" not in kinds,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 8 if alpha is None else alpha,
        "lora_dropout": 0.0 if parameters else dropout,
        "modules_to_save": sorted(modules_to_save) or None,
        "peft_type": "LORA",
        "r": 8 if rank is None else rank,
        "rank_pattern": pattern_keys(ranks, rank),
        "revision": None,
        "target_modules": target_modules,
        "task_type": task_type,
        "use_dora": dora,
        "use_rslora": rslora,
    }
    if lora_bias:
        config["lora_bias"] = True
    if tokens:
        config["trainable_token_indices"] = dict(tokens)
    if parameters:
        # Stacks of experts are laid out as this PEFT lays them out, which readers tell by version.
        config |= {"peft_version": PEFT_VERSION, "target_parameters": parameters}
    return config


def _whole(alpha: float) -> float:
    """PEFT's alpha is an int; others are written as the float they are."""
    return int(alpha) if alpha == int(alpha) else alpha


@dataclass(frozen=True)
class Claims:
    """The claims of a foreign adapter_config.json that are needed to read the tensors.

    `modules_to_save` and the keys of `tokens` are names or ends of names, targets full names or
    ends of names after a dot (none for an expression), patterns in the file's order,
    `peft_version` is `(major, minor)`.
    """

    rank: int | None
    alpha: float
    rslora: bool
    dora: bool
    dropout: float
    fan_in_fan_out: bool
    bias: str
    lora_bias: bool
    tokens: Mapping[str, tuple[int, ...]]
    modules_to_save: tuple[str, ...]
    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...]
    peft_version: tuple[int, int] | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    asked: str

    def numbers(self, names: Collection[str]) -> dict[str, tuple[int | None, float]]:
        """The rank and the alpha that the file claims for each site."""
        ranks = values_of(self.rank_pattern, names, self.rank, f"{self.asked}, 'rank_pattern'")
        alphas = values_of(self.alpha_pattern, names, self.alpha, f"{self.asked}, 'alpha_pattern'")
        return {name: (ranks[name], alphas[name]) for name in names}

    @property
    def scaling(self) -> str:
        """The scaling as a site's spec calls it."""
        return "rslora" if self.rslora else "standard"

    def scale(self, alpha: float, rank: int) -> float:
        """The scale that the file means by an alpha on tensors of this rank."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_claims(config: Any, asked: str, allow: Collection[str] = ()) -> Claims:
    """Check a foreign config, refusals first, and return what is needed of it.

    `allow` names fields to accept although they are unknown, or `init_lora_weights` where the base
    at hand is the one that the init has changed.
    """
    _require(isinstance(config, dict), asked, "it is not a table of fields")
    _refuse_other_methods(config, asked)
    _refuse_changed_base(config, asked, allow)
    unknown = sorted(config.keys() - _KNOWN - _REFUSED.keys() - set(allow))
    unknown = [field for field in unknown if config[field]]
    if unknown:
        raise FormatError(
            asked,
            f"it sets {one_line(unknown)}, which this package does not know",
            f"If it does not change what the tensors mean, accept it: allow={unknown[:3]}",
        )
    _require_alpha(config, asked)
    rank = config.get("r")
    _require(rank is None or _is_rank(rank), asked, "'r' is not a whole number above 0")
    dropout = config.get("lora_dropout") or 0.0
    _require(_is_number(dropout) and 0 <= dropout < 1, asked, "'lora_dropout' is not in [0, 1)")
    return Claims(
        rank=rank,
        alpha=float(config["lora_alpha"]),
        rslora=_flag(config, "use_rslora", asked),
        dora=_flag(config, "use_dora", asked),
        dropout=float(dropout),
        fan_in_fan_out=_flag(config, "fan_in_fan_out", asked),
        bias=_choice(config, "bias", ("none", "lora_only", "all"), asked),
        lora_bias=_flag(config, "lora_bias", asked),
        tokens=_tokens(config.get("trainable_token_indices"), asked),
        modules_to_save=_names(config, "modules_to_save", asked),
        target_modules=_target_modules(config),
        target_parameters=_names(config, "target_parameters", asked),
        peft_version=_version(config.get("peft_version")),
        rank_pattern=_patterns(config, "rank_pattern", _is_rank, asked),
        alpha_pattern=_patterns(config, "alpha_pattern", _is_alpha, asked),
        asked=asked,
    )


def _refuse_other_methods(config: Mapping[str, Any], asked: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise FormatError(asked, f"its peft_type is {str(kind)[:40]!r}, not 'LORA'", _AS_LORA)
    for field, (what, remedy) in _REFUSED.items():
        if config.get(field):
            raise FormatError(asked, f"'{field}' is set: it is {what}", remedy)


def _refuse_changed_base(config: Mapping[str, Any], asked: str, allow: Collection[str]) -> None:
    init = config.get("init_lora_weights", True)
    if str(init).lower() in _PLAIN_INITS or init is None or "init_lora_weights" in allow:
        return
    raise FormatError(
        asked,
        f"'init_lora_weights' is {str(init)[:40]!r}: with it, PEFT changes the base's weights when "
        "it loads the adapter",
        f"{_RESIDUAL}; or, where your base holds the changed weights, pass "
        "allow=['init_lora_weights']",
    )


def _require_alpha(config: Mapping[str, Any], asked: str) -> None:
    if config.get("lora_alpha") is None:
        raise FormatError(
            asked, "'lora_alpha' is missing", "Ask the author of the adapter; it is never guessed"
        )
    _require(_is_alpha(config["lora_alpha"]), asked, "'lora_alpha' is not a number above 0")


def _flag(config: Mapping[str, Any], field: str, asked: str) -> bool:
    value = config.get(field)
    _require(value is None or isinstance(value, bool), asked, f"'{field}' is not true or false")
    return bool(value)


def _choice(config: Mapping[str, Any], field: str, choices: tuple[str, ...], asked: str) -> str:
    value = config.get(field) or choices[0]
    _require(value in choices, asked, f"'{field}' is not one of {', '.join(choices)}")
    return str(value)


def _names(config: Mapping[str, Any], field: str, asked: str) -> tuple[str, ...]:
    value = config.get(field) or []
    good = isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    _require(good, asked, f"'{field}' is not a list of names")
    return tuple(value)


def _tokens(value: Any, asked: str) -> dict[str, tuple[int, ...]]:
    """Return the rows that train, by the end of a module's name; `""` if none is named."""
    tables = value if isinstance(value, dict) else {"": value} if value else {}
    found = {}
    for name, ids in tables.items():
        good = isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)
        good = good and len(set(ids)) == len(ids)
        _require(good, asked, "'trainable_token_indices' is not a list of rows, or one for a name")
        found[name] = tuple(ids)
    return found


def _target_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a list; never a reason to refuse, since the tensors say what is adapted."""
    value = config.get("target_modules")
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _patterns(
    config: Mapping[str, Any], field: str, is_value: Any, asked: str
) -> Mapping[str, Any]:
    table = config.get(field) or {}
    _require(isinstance(table, dict), asked, f"'{field}' is not a table")
    for key, value in table.items():
        _require(is_value(value), asked, f"'{field}' gives {key[:80]!r} an impossible value")
    return table


def _version(value: Any) -> tuple[int, int] | None:
    parts = str(value).split(".")[:2]
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(map(_digits, parts)) else None


def _digits(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 6


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in {int, float} and abs(value) < 1e300


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and value > 0


def _require(holds: Any, asked: str, found: str) -> None:
    if not holds:
        raise FormatError(asked, found, "Correct the file, or fetch it again")
