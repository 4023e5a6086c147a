r"""PEFT's patterns of names: written to hit just what is meant, read as PEFT reads them.

Of `rank_pattern` PEFT takes the first key for which `re.match(r"(.*\.)?(KEY)$", name)` holds. A
key is written as a plain name where that hits nothing else (PEFT before 0.15 and some servers look
names up literally), and as `^` with an escaped name elsewhere. Such keys are looked up; any other
key of a file is run as the regular expression that it is, under a time limit.

PEFT matches modules by ends of names (`target_modules`: after a dot; `modules_to_save`: anywhere)
and by unescaped patterns, so a full name may hit more than it says. Where the model's names are
known, such a name is written in another way, or left out of `modules_to_save`.

Source: peft 0.21.2, utils/other.py, `get_pattern_key` and `_set_trainable`; tuners/tuners_utils.py,
`check_target_module_exists`.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

import regex

from lora_inject.core.spec.names import around, leaf, parent
from lora_inject.core.spec.patterns import NOT_A_REGEX, at_the_end
from lora_inject.errors import FormatError
from lora_inject.formats.model_facts import ModelFacts

T = TypeVar("T", bound=Hashable)

_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")
_MAX_KEY_LENGTH = 1000
MATCH_SECONDS = 5.0  # for all patterns of a file and all names; harmless ones take milliseconds


def values_of(table: Mapping[str, T], names: Collection[str], default: T) -> dict[str, T]:
    """Return the value that PEFT would take for each name: that of the first key that hits it."""
    values = dict.fromkeys(names, default)
    hits: dict[str, list[str]] = {key: [] for key in table}
    plain = _PlainKeys(key for key in table if _PLAIN.fullmatch(key))
    for name in values if table else ():
        for key in plain.hitting(name):
            hits[key].append(name)
    end = time.thread_time() + MATCH_SECONDS
    for key in table:
        name = _unescaped(key)
        if key == _escaped(name):
            hits[key] += [name] if name in values else []
        elif not _PLAIN.fullmatch(key):
            hits[key] += matching_in_time(key, names, f"the key {key[:80]!r}", end)
    for key in reversed([*table]):  # so that the first key stays
        values.update(dict.fromkeys(hits[key], table[key]))
    return values


def matching_in_time(
    pattern: str, names: Collection[str], asked: str, end: float | None = None
) -> list[str]:
    """Return the names that a stranger's pattern matches, as `matching` does, within a time limit.

    A backtracking regex can take exponential time on a short name. `end` is in seconds of this
    thread, by default MATCH_SECONDS from now.
    """
    end = time.thread_time() + MATCH_SECONDS if end is None else end
    if len(pattern) > _MAX_KEY_LENGTH:
        raise FormatError(asked, f"it has {len(pattern):,} characters", "Write shorter patterns")
    try:
        # To `re`, a brace that is not a count is text; to `regex`, it may ask for a fuzzy match.
        brace = r"(?<!\\)((?:\\\\)*)(?<!\\N)\{(?!\d+(?:,\d*)?\}|,\d*\})"
        compiled = regex.compile(re.sub(brace, r"\1\\{", at_the_end(pattern)))
    except (*NOT_A_REGEX, regex.error) as error:
        problem = f"it is not a regular expression ({error})"
        raise FormatError(asked, problem, "Write full module names, or correct it") from error
    hits = []
    for name in names:
        left = end - time.thread_time()  # `timeout` counts other threads, too
        try:
            if compiled.match(name, timeout=max(left, 1e-6)):
                hits.append(name)
        except TimeoutError:
            what = f"its patterns took more than {MATCH_SECONDS:g} s to match (on '{name[:60]}')"
            remedy = "Write the pattern without repetition inside repetition, such as (a+)+"
            raise FormatError(asked, what, remedy) from None
    return hits


def _escaped(name: str) -> str:
    return "^" + re.escape(name)


def _unescaped(key: str) -> str:
    return re.sub(r"\\(.)", r"\1", key.removeprefix("^"))


class _PlainKeys:
    """Plain names as keys: each hits any end of a name after a dot, and its dots any character.

    They are looked up with the characters at their dots blanked, since comparing each of n names
    with each key would take minutes for the experts of a large model.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._groups: dict[int, dict[tuple[int, ...], set[str]]] = {}
        for key in keys:
            dots = tuple(n for n, character in enumerate(key) if character == ".")
            self._groups.setdefault(len(key), {}).setdefault(dots, set()).add(key)

    def hitting(self, name: str) -> Iterator[str]:
        """Yield the keys that hit a name."""
        for end in ends(name):
            for dots, keys in self._groups.get(len(end), {}).items():
                blanked = list(end)
                for dot in dots:
                    blanked[dot] = "."
                if (key := "".join(blanked)) in keys:
                    yield key


def ends(name: str) -> Iterator[str]:
    """Yield a name and all of its ends after a dot."""
    while name:
        yield name
        name = name.partition(".")[2]


def common(values: Iterable[T]) -> T | None:
    """The most frequent value, the first of them on a tie; None where there are none."""
    ranked = Counter(values).most_common(1)
    return ranked[0][0] if ranked else None


def pattern_keys(values: Mapping[str, T], default: T | None) -> dict[str, T]:
    """Return the pattern table that gives each site its value and hits nothing else wrongly.

    No two keys disagree about a site, so their order does not matter.
    """
    keys = _PlainKeys(values)
    unequal = {key for name in values for key in keys.hitting(name) if values[key] != values[name]}
    table = {}
    for name, value in values.items():
        if value != default:
            literal = bool(_PLAIN.fullmatch(name)) and name not in unequal
            table[name if literal else _escaped(name)] = value
    return dict(sorted(table.items()))


# Modules ----------------------------------------------------------------------------------------

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
    held = Counter(module for name in facts.tensor_names for module in around([name]))
    given = Counter(module for name in trained for module in around([name]))
    whole = {module for module, n in given.items() if held[module] == n}
    modules = set(facts.module_names or ()) | set(held)
    chosen = {_outermost(name, whole) for name in trained} - {""}
    chosen = {module for module in chosen if chosen.isdisjoint(around([module]))}
    return sorted(name for name in chosen if _hits_only_itself(name, modules, sites))


def bias_setting(trained: Iterable[str], *, sites: Collection[str], whole: Collection[str]) -> str:
    """Return PEFT's `bias`: which biases are saved besides the whole modules."""
    biases = [n for n in trained if leaf(n) == "bias" and not {*around([n])} & {*whole}]
    if not biases:
        return "none"
    return "lora_only" if all(parent(name) in sites for name in biases) else "all"


def allowed_task(task: str | None, *, whole: Collection[str]) -> str | None:
    """Return a task type, None where PEFT would look for a head that does not travel whole."""
    has_head = any(leaf(name) in _HEADS for name in whole)
    return task if has_head or task not in _TASKS_WITH_HEAD else None


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
