"""How PEFT is told which modules to adapt and which to keep whole.

PEFT matches by ends of names (`target_modules`: after a dot; `modules_to_save`: anywhere) and by
unescaped patterns, so a full name may hit more than it says. Where the model's names are known, a
name that would hit too much is written in another way, or left out of `modules_to_save`.

Source: peft 0.21.2, tuners/tuners_utils.py `check_target_module_exists`, utils/other.py
`_set_trainable`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.peft.number_patterns import ends
from lora_inject.spec.names import leaf, parent

# PEFT's own word for "adapt nothing": it accepts an adapter without sites under this name only.
_NOTHING = "dummy-target-modules"
# PEFT keeps these whole for their tasks, so their parts are not listed one by one.
_HEADS = ("classifier", "score", "qa_outputs")
_TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def target_modules(
    names: Collection[str], facts: ModelFacts, *, parameters: bool
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


def whole_modules(
    trained: Iterable[str], facts: ModelFacts, *, sites: Collection[str]
) -> list[str]:
    """Return the modules whose tensors are all in `trained`, for PEFT's `modules_to_save`.

    A trained tensor outside of them travels under its plain name. PEFT loads that into the base, as
    it does with biases: right for one adapter, and not undone when the adapter is switched off.
    Without the names of the base's tensors no module is known to be whole.
    """
    if facts.tensor_names is None:
        return []
    trained = list(trained)
    held = Counter(module for name in facts.tensor_names for module in ancestors(name))
    given = Counter(module for name in trained for module in ancestors(name))
    whole = {module for module, n in given.items() if held[module] == n}
    modules = set(facts.module_names or ()) | set(held)
    chosen = {_outermost(name, whole) for name in trained} - {""}
    chosen = {module for module in chosen if chosen.isdisjoint(ancestors(module))}
    return sorted(name for name in chosen if _hits_only_itself(name, modules, sites))


def bias_setting(trained: Iterable[str], *, sites: Collection[str], whole: Collection[str]) -> str:
    """Return PEFT's `bias`: which biases are saved besides the whole modules."""
    biases = [n for n in trained if leaf(n) == "bias" and not {*ancestors(n)} & {*whole}]
    if not biases:
        return "none"
    return "lora_only" if all(parent(name) in sites for name in biases) else "all"


def allowed_task(task: str | None, *, whole: Collection[str]) -> str | None:
    """Return a task type, None where PEFT would look for a head that does not travel whole."""
    has_head = any(leaf(name) in _HEADS for name in whole)
    return task if has_head or task not in _TASKS_WITH_HEAD else None


def _outermost(name: str, whole: Collection[str]) -> str:
    """The module to keep whole for one tensor: a head as PEFT knows it, else its own, or ""."""
    heads = [m for m in ancestors(name) if m in whole and leaf(m) in _HEADS]
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


def ancestors(name: str) -> Iterator[str]:
    """The modules around a tensor, innermost first, the root excluded."""
    while "." in name:
        name = parent(name)
        yield name
