"""Which modules PEFT adapts by a config: it ignores the tensors of all others, without a word.

Source: peft 0.21.2, tuners/tuners_utils.py, `check_target_module_exists`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from lora_inject.core.spec.names import around, first_number
from lora_inject.formats.peft.adapter_config import Claims
from lora_inject.formats.peft.name_patterns import ends, matching_in_time

_ALL_LINEAR = "all-linear"


def not_adapted(claims: Claims, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the modules that PEFT would not adapt, each with the field that says so."""
    excluded = _hit(claims.exclude_modules or None, names, "exclude_modules")
    targets = claims.target_modules
    nothing_said = targets is None and not claims.target_parameters  # PEFT goes by the model then
    any_name = nothing_said or targets == _ALL_LINEAR
    targeted = {*names} if any_name else _hit(targets, names, "target_modules")
    layers = {*names} if isinstance(targets, str) else _in_layers(claims, names)
    saved = {*claims.modules_to_save}
    for name in names:
        if name in excluded:
            yield name, "exclude_modules"
        elif any(not saved.isdisjoint(ends(module)) for module in around([f"{name}.weight"])):
            yield name, "modules_to_save"
        elif name not in targeted and not (claims.ensure_weight_tying and _is_an_end(name)):
            yield name, "target_modules"
        elif name in targeted and name not in layers:
            yield name, "layers_to_transform"


def _is_an_end(name: str) -> bool:
    """Whether a name is in no list of layers: PEFT adapts the other end of a tie with the one."""
    return first_number(name) is None


def _in_layers(claims: Claims, names: Collection[str]) -> set[str]:
    """Return the names whose first number after a list's name is that of a layer to transform."""
    if not claims.layers_to_transform:
        return {*names}
    starts = [rf"(?:^|.*?\.){name}\." for name in claims.layers_pattern] or [r".*?\.[^.]*\."]
    found = {n: [re.match(rf"{start}(\d+)\.", n) for start in starts] for n in names}
    first = {name: next(filter(None, matches), None) for name, matches in found.items()}
    return {name for name, m in first.items() if m and int(m[1]) in claims.layers_to_transform}


def _hit(said: frozenset[str] | str | None, names: Collection[str], field: str) -> set[str]:
    """Return the names that are listed, end so after a dot, or match an expression in whole."""
    if said is None:
        return set()
    if isinstance(said, str):
        return {*matching_in_time(f"^(?:{said})", names, repr(field))}
    return {name for name in names if not said.isdisjoint(ends(name))}
