"""What this package writes into adapter_config.json, so that PEFT adapts just what is meant.

PEFT matches modules by ends of names (`target_modules`: after a dot; `modules_to_save`: anywhere)
and by unescaped patterns, so a full name may hit more than it says. Where the model's names are
known, such a name is written in another way, or left out of `modules_to_save`.

Source: peft 0.21.2, tuners/lora/config.py; utils/other.py, `_set_trainable`;
tuners/tuners_utils.py, `check_target_module_exists`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any, TypeVar

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.names import around, leaf, parent
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.pairs import pair_alpha, pair_rank
from lora_inject.formats.peft.fields import HEADS
from lora_inject.formats.peft.name_patterns import PlainKeys, ends, escaped, is_plain
from lora_inject.formats.peft.tensor_layout import attentions, wrapped

T = TypeVar("T", bound=Hashable)

PEFT_VERSION = "0.21.2"
"""The PEFT whose layout the files follow."""

_NOTHING = "dummy-target-modules"
"""PEFT's own word for "adapt nothing": it accepts an adapter without sites under this name only."""

_HEADS = {name for heads in HEADS.values() for name in heads}


def build(state: AdapterState, facts: ModelFacts) -> dict[str, Any]:
    """Return adapter_config.json as plain data.

    Only fields that PEFT has had since 0.12 are written, newer ones where they are needed: an older
    PEFT warns of a field that it does not know, or fails.
    """
    specs = [site.spec for site in state.sites.values()]
    rslora = bool(specs) and all(spec.scaling == "rslora" for spec in specs)
    called = attentions(specs)
    targets = {called.get(s.name) or _target(s, facts.expert_names): s for s in specs}
    ranks = {name: pair_rank(spec) for name, spec in targets.items()}
    alphas = {name: _as_peft(pair_alpha(s, rslora=rslora)) for name, s in targets.items()}
    rank, alpha = _common(ranks.values()), _common(alphas.values())
    whole_attentions = {*called.values()}
    modules = [n for n, s in targets.items() if n == wrapped(s) or n in whole_attentions]
    parameters = sorted(targets.keys() - {*modules})
    kinds = {targets[name].kind for name in modules}
    dropout = _common(spec.dropout for spec in specs)
    full = [name for name in state.trained if name not in state.rows]
    adapted = {wrapped(spec) for spec in specs}
    whole = _whole_modules(full, facts, adapted)
    fields: dict[str, Any] = {
        "alpha_pattern": pattern_keys(alphas, alpha),
        "auto_mapping": None,
        "base_model_name_or_path": facts.base_model,
        "bias": _bias_setting(full, adapted, whole),
        "fan_in_fan_out": "conv1d" in kinds and "linear" not in kinds,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 8 if alpha is None else alpha,
        "lora_dropout": 0.0 if parameters else dropout or 0.0,  # PEFT refuses it on a parameter
        "modules_to_save": whole or None,
        "peft_type": "LORA",
        "r": 8 if rank is None else rank,
        "rank_pattern": pattern_keys(ranks, rank),
        "revision": None,
        "target_modules": _target_modules(modules, facts, parameters),
        "task_type": _allowed_task(facts.task_type, whole),
        "use_dora": any(spec.variant == "dora" for spec in specs),
        "use_rslora": rslora,
    }
    if any(spec.lora_bias for spec in specs):
        fields["lora_bias"] = True
    if state.rows:
        fields["trainable_token_indices"] = {parent(n): [*rows] for n, rows in state.rows.items()}
    if parameters:
        fields["target_parameters"] = parameters
    if parameters or called:  # laid out as this PEFT lays them out: readers tell by version
        fields["peft_version"] = PEFT_VERSION
    return fields


def _as_peft(alpha: float) -> float:
    """Return an alpha as the int that it is in PEFT, where it is whole."""
    return int(alpha) if alpha == int(alpha) else alpha


def _target(spec: SiteSpec, expert_names: Collection[str]) -> str:
    """The name of what PEFT adapts for a site: a module, or a parameter.

    A linear layer whose weight is read, or whose name PEFT takes for an expert's, is adapted by its
    weight, with the same tensors.
    """
    by_weight = spec.update == "weight" or leaf(spec.name) in expert_names
    return spec.weight if spec.kind == "linear" and by_weight else spec.name


def _common(values: Iterable[T]) -> T | None:
    """The most frequent value, the first of them on a tie; None where there are none."""
    ranked = Counter(values).most_common(1)
    return ranked[0][0] if ranked else None


def pattern_keys(values: Mapping[str, T], default: T | None) -> dict[str, T]:
    """Return the pattern table that gives each site its value and hits nothing else wrongly.

    A key is a plain name where that hits nothing else (PEFT before 0.15 and some servers look names
    up literally), and `^` with an escaped name elsewhere. No two keys disagree about a site, so
    their order does not matter.
    """
    keys = PlainKeys(values)
    unequal = {key for name in values for key in keys.hitting(name) if values[key] != values[name]}
    table = {}
    for name, value in values.items():
        if value != default:
            literal = is_plain(name) and name not in unequal
            table[name if literal else escaped(name)] = value
    return dict(sorted(table.items()))


def _target_modules(
    names: Collection[str], facts: ModelFacts, parameters: Collection[str]
) -> list[str] | str:
    """Return PEFT's `target_modules` for exactly these modules (full names).

    The sorted names; or one anchored expression where a name is also the end of another module's
    name, which a list would adapt as well.
    """
    if not names:
        return [] if parameters else _NOTHING
    others = set(facts.module_names or ()) - set(names)
    if {end for other in others for end in ends(other)}.isdisjoint(names):
        return sorted(names)
    return f"(?:{'|'.join(re.escape(name) for name in sorted(names))})"


def _whole_modules(trained: list[str], facts: ModelFacts, sites: Collection[str]) -> list[str]:
    """Return the modules whose tensors are all in `trained`, for PEFT's `modules_to_save`.

    A trained tensor outside of them travels under its plain name. PEFT loads that into the base, as
    it does with biases: right for one adapter, and not undone when the adapter is switched off.
    Without the names of the base's tensors no module is known to be whole.
    """
    if facts.tensor_names is None:
        return []
    held = Counter(module for name in facts.tensor_names for module in around([name]))
    given = Counter(module for name in trained for module in around([name]))
    whole = {module for module, n in given.items() if held[module] == n}
    modules = set(facts.module_names or ()) | set(held)
    chosen = {_outermost(name, whole) for name in trained} - {""}
    chosen = {module for module in chosen if chosen.isdisjoint(around([module]))}
    return sorted(name for name in chosen if _hits_only_itself(name, modules, sites))


def _outermost(name: str, whole: Collection[str]) -> str:
    """The module to keep whole for one tensor: a head as PEFT knows it, else its own, or ""."""
    heads = [m for m in around([name]) if m in whole and leaf(m) in _HEADS]
    return heads[-1] if heads else parent(name) if parent(name) in whole else ""


def _hits_only_itself(name: str, modules: Iterable[str], sites: Iterable[str]) -> bool:
    """Whether PEFT would keep whole just this module, and would still adapt all sites.

    PEFT wraps every module whose name ends so, without regard to dots, and adapts none whose name
    has the pattern between dots (or ends).
    """
    if not re.fullmatch(r"[\w.-]+", name):
        return False
    if any(module.endswith(name) for module in modules if module != name):
        return False
    excluded = re.compile(rf"(^|.*\.){name}($|\..*)")
    return not any(excluded.match(site) for site in sites)


def _bias_setting(trained: Iterable[str], sites: Collection[str], whole: Collection[str]) -> str:
    """Return PEFT's `bias`: which biases are saved besides the whole modules."""
    biases = [n for n in trained if leaf(n) == "bias" and not {*around([n])} & {*whole}]
    if not biases:
        return "none"
    return "lora_only" if all(parent(name) in sites for name in biases) else "all"


def _allowed_task(task: str | None, whole: Collection[str]) -> str | None:
    """Return a task type, None where PEFT would look for a head that does not travel whole."""
    has_head = any(leaf(name) in _HEADS for name in whole)
    return task if has_head or task not in HEADS else None
