"""adapter_config.json: what this package writes into it, and what it accepts from others.

Fields that change what the tensors mean (DoRA, an init that changed the base, replicated layers)
are refused by name before anything else is read. Alpha and rank are looked up for each site. The
rest (task, versions) is not needed. The tensors' names say which sites there are, and PEFT leaves
tensors out whose modules the config does not target (`targeted`).

Source: peft 0.21.2, tuners/lora/config.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_inject.core.adapter.file_keys import one_line
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.strict_json import is_positive, misfit
from lora_inject.core.spec.names import leaf, parent
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError, within
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.peft.name_patterns import (
    allowed_task,
    bias_setting,
    common,
    pattern_keys,
    target_modules,
    values_of,
    whole_modules,
)
from lora_inject.formats.peft.tensor_layout import attentions, file_alpha, file_rank, wrapped

# The PEFT whose layout the files follow.
PEFT_VERSION = "0.21.2"

# Writing ----------------------------------------------------------------------------------------


def build(state: AdapterState, facts: ModelFacts) -> dict[str, Any]:
    """Return adapter_config.json as plain data.

    Only fields that PEFT has had since 0.12 are written, newer ones where they are needed: an older
    PEFT warns of a field that it does not know, or fails.
    """
    targets = _Targets(state, facts)
    rank, alpha = common(targets.ranks.values()), common(targets.alphas.values())
    has_parameters = bool(targets.parameters)
    dropout = common(spec.dropout for spec in targets.specs)
    kinds = set(targets.modules.values())
    return {
        "alpha_pattern": pattern_keys(targets.alphas, alpha),
        "auto_mapping": None,
        "base_model_name_or_path": facts.base_model,
        "fan_in_fan_out": "conv1d" in kinds and "linear" not in kinds,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 8 if alpha is None else alpha,
        # PEFT refuses dropout on a parameter.
        "lora_dropout": 0.0 if has_parameters else dropout or 0.0,
        "peft_type": "LORA",
        "r": 8 if rank is None else rank,
        "rank_pattern": pattern_keys(targets.ranks, rank),
        "revision": None,
        "target_modules": target_modules(targets.modules, facts, parameters=has_parameters),
        "use_dora": any(spec.variant == "dora" for spec in targets.specs),
        "use_rslora": targets.rslora,
        **_trained_fields(state, facts, {wrapped(spec) for spec in targets.specs}),
        **_newer_fields(state, targets),
    }


def _trained_fields(
    state: AdapterState, facts: ModelFacts, adapted: Collection[str]
) -> dict[str, Any]:
    """Return the fields that say which tensors the file has in full."""
    full = [name for name in state.trained if name not in state.rows]
    whole = whole_modules(full, facts, sites=adapted)
    return {
        "bias": bias_setting(full, sites=adapted, whole=whole),
        "modules_to_save": whole or None,
        "task_type": allowed_task(facts.task_type, whole=whole),
    }


class _Targets:
    """What PEFT adapts for the sites of an adapter: modules or parameters, and their numbers."""

    def __init__(self, state: AdapterState, facts: ModelFacts) -> None:
        self.specs = [site.spec for site in state.sites.values()]
        self.rslora = bool(self.specs) and all(spec.scaling == "rslora" for spec in self.specs)
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}
        self.modules: dict[str, str] = {}  # with their kinds
        self.attentions = attentions(self.specs)
        for site in state.sites.values():
            name = self.attentions.get(site.spec.name) or _target(site.spec, facts.expert_names)
            alpha = file_alpha(site.spec, rslora=self.rslora)
            self.alphas[name] = int(alpha) if alpha == int(alpha) else alpha  # an int in PEFT
            self.ranks[name] = file_rank(site.spec)
            if name == wrapped(site.spec):
                self.modules[name] = site.spec.kind
        self.parameters = sorted(self.ranks.keys() - self.modules.keys())


def _newer_fields(state: AdapterState, targets: _Targets) -> dict[str, Any]:
    """Return the fields that PEFT has had since a later version, where they say something."""
    fields: dict[str, Any] = {}
    if any(site.spec.lora_bias for site in state.sites.values()):
        fields["lora_bias"] = True
    if state.rows:
        fields["trainable_token_indices"] = {parent(n): [*rows] for n, rows in state.rows.items()}
    if targets.parameters or targets.attentions:
        # Stacks and attentions are laid out as this PEFT lays them out: readers tell by version.
        fields["peft_version"] = PEFT_VERSION
    if targets.parameters:
        fields["target_parameters"] = targets.parameters
    return fields


def _target(spec: SiteSpec, expert_names: Collection[str]) -> str:
    """The name of what PEFT adapts for a site: a module, or a parameter.

    A linear layer whose weight is read, or whose name PEFT takes for an expert's, is adapted by its
    weight, with the same tensors.
    """
    by_weight = spec.update == "weight" or leaf(spec.name) in expert_names
    return spec.weight if spec.kind == "linear" and by_weight else spec.name


# Reading ----------------------------------------------------------------------------------------

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
_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "true", "false", "none"}
_NOT_NEEDED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "loftq_config", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
}  # fmt: skip


def _are_rows(value: Any) -> bool:
    several = [*value.values()] if isinstance(value, dict) else [value] if value else []
    right = not misfit(several, [[range(2**63)]])
    return right and all(rows and len(set(rows)) == len(rows) for rows in several)


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _are_layers(value: Any) -> bool:
    return not misfit(_several(value), [range(2**63)])


def _are_lists(value: Any) -> bool:
    return all(isinstance(name, str) and name.isidentifier() for name in _several(value))


LAYOUTS_OF_B = ("rank_major", "grouped_by_expert")
"""How unsloth has ordered the columns of a stack's B: as PEFT does, or by expert first."""
_RANK = range(1, 2**63)
_NAMES = [lambda name: isinstance(name, str) and name], "a list of names"
_FLAG = bool, "true or false"
# Field: its form, and the form in words.
_FORMS: dict[str, tuple[Any, str]] = {
    "r": (_RANK, "a whole number above 0"),
    "lora_alpha": (is_positive, "a number above 0"),
    "lora_dropout": (lambda value: type(value) in (int, float) and 0 <= value < 1, "in [0, 1)"),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "lora_bias": _FLAG,
    "fan_in_fan_out": _FLAG,
    "bias": (("none", "lora_only", "all").__contains__, "one of none, lora_only, all"),
    "ensure_weight_tying": _FLAG,
    "layers_to_transform": (_are_layers, "a layer, or a list of them"),
    "layers_pattern": (_are_lists, "a name of a list of layers, or several"),
    "lora_B_layout": (LAYOUTS_OF_B.__contains__, f"one of {', '.join(LAYOUTS_OF_B)}"),
    "modules_to_save": _NAMES,
    "target_parameters": _NAMES,
    "trainable_token_indices": (_are_rows, "a list of rows, or one for a name"),
    "rank_pattern": ({...: _RANK}, "a table of whole numbers above 0"),
    "alpha_pattern": ({...: is_positive}, "a table of numbers above 0"),
}


@dataclass(frozen=True)
class Claims:
    """What a foreign adapter_config.json states and reading needs, under PEFT's names.

    `modules_to_save` and the keys of `trainable_token_indices` are names or ends of names;
    `target_modules` and `exclude_modules` are full names or ends of names after a dot, or an
    expression for full names, and None where the file has none; `peft_version` is `(major, minor)`;
    `of_unsloth` is whether the file has a sign of unsloth, whose older stacks have another layout.
    """

    lora_alpha: float
    r: int | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    lora_bias: bool = False
    trainable_token_indices: Mapping[str, Sequence[int]] = field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    target_modules: frozenset[str] | str | None = None
    exclude_modules: frozenset[str] | str | None = None
    target_parameters: Sequence[str] = ()
    ensure_weight_tying: bool = False
    layers_to_transform: Sequence[int] = ()
    layers_pattern: Sequence[str] = ()
    lora_B_layout: str | None = None  # noqa: N815 - PEFT's name
    of_unsloth: bool = False
    peft_version: tuple[int, int] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def numbers(self, names: Collection[str]) -> dict[str, tuple[int | None, float]]:
        """The rank and the alpha that the file claims for each site."""
        with within("'rank_pattern'"):
            ranks = values_of(self.rank_pattern, names, self.r)
        with within("'alpha_pattern'"):
            alphas = values_of(self.alpha_pattern, names, self.lora_alpha)
        return {name: (ranks[name], float(alphas[name])) for name in names}

    @property
    def scaling(self) -> str:
        """The scaling as a site's spec calls it."""
        return "rslora" if self.use_rslora else "standard"

    def scale(self, alpha: float, rank: int) -> float:
        """The scale that the file means by an alpha on tensors of this rank."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_claims(config: Any, allow: Collection[str] = ()) -> Claims:
    """Check a foreign config, refusals first, and return what is needed of it.

    `allow` names fields to accept although they are unknown, or `init_lora_weights` where the base
    at hand is the one that the init has changed.
    """
    _require(isinstance(config, dict), "it is not a table of fields")
    _refuse_other_methods(config, allow)
    unknown = sorted(config.keys() - _FORMS.keys() - _NOT_NEEDED - _REFUSED.keys() - set(allow))
    if unknown := [name for name in unknown if config[name]]:
        problem = f"it sets {one_line(unknown)}, which this package does not know"
        remedy = f"If it does not change what the tensors mean, accept it: allow={unknown[:3]}"
        raise FormatError("", problem, remedy)
    said = {name: config[name] for name in _FORMS if config.get(name) is not None}
    if "lora_alpha" not in said:
        remedy = "Ask the author of the adapter; it is never guessed"
        raise FormatError("", "'lora_alpha' is missing", remedy)
    for name, value in said.items():
        check_field(name, value)
    for name in said.keys() & {"layers_to_transform", "layers_pattern"}:
        said[name] = _several(said[name])
    rows = said.get("trainable_token_indices") or {}
    said["trainable_token_indices"] = rows if isinstance(rows, dict) else {"": rows}
    return Claims(
        target_modules=_names_or_regex(config, "target_modules"),
        exclude_modules=_names_or_regex(config, "exclude_modules"),
        peft_version=_version(config.get("peft_version")),
        of_unsloth=_is_of_unsloth(config),
        **said,
    )


def _is_of_unsloth(config: Mapping[str, Any]) -> bool:
    mapping, base = config.get("auto_mapping"), config.get("base_model_name_or_path")
    fixed = isinstance(mapping, dict) and bool(mapping.get("unsloth_fixed"))
    return fixed or str(base).startswith("unsloth/")


def _names_or_regex(config: Mapping[str, Any], field: str) -> frozenset[str] | str | None:
    value = config.get(field)
    if isinstance(value, list):
        return frozenset(map(str, value))
    return value if isinstance(value, str) else None


def check_field(name: str, value: Any) -> None:
    """Refuse a value that a field of adapter_config.json cannot have."""
    form, words = _FORMS[name]
    wrong = misfit(value, form)
    _require(not wrong, f"'{name}' is not {words} ({wrong.lstrip('.: ')})")


def _refuse_other_methods(config: Mapping[str, Any], allow: Collection[str]) -> None:
    kind, init = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA":
        raise FormatError("", f"its peft_type is {str(kind)[:40]!r}, not 'LORA'", _AS_LORA)
    for name, (what, remedy) in _REFUSED.items():
        if config.get(name):
            raise FormatError("", f"'{name}' is set: it is {what}", remedy)
    if str(init).lower() not in _PLAIN_INITS and "init_lora_weights" not in allow:
        problem = f"'init_lora_weights' is {str(init)[:40]!r}: with it, PEFT changes the base's "
        problem += "weights when it loads the adapter"
        remedy = f"{_RESIDUAL}; or, where your base holds the changed weights, pass "
        raise FormatError("", problem, f"{remedy}allow=['init_lora_weights']")


def _version(value: Any) -> tuple[int, int] | None:
    parts = str(value).split(".")[:2]
    digits = [part.isascii() and part.isdigit() and len(part) < 6 for part in parts]
    return (int(parts[0]), int(parts[1])) if digits == [True, True] else None


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise FormatError("", problem, "Correct the file, or fetch it again")
