"""The fields of PEFT's LoraConfig, stated once, and PEFT's own rules of names, run on names.

They are read of the folders of others, of a LoraConfig, and for `check`. Fields that change what
the tensors mean (replicated layers, Arrow routers) are refused by name. What a file does not need
(task, versions) is known and ignored.

Source: peft 0.21.2, tuners/lora/config.py; tuners/tuners_utils.py, `check_target_module_exists`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lora_inject.core.adapter.file_keys import one_line
from lora_inject.core.spec.names import around
from lora_inject.core.spec.regexes import checked_regex
from lora_inject.errors import FormatError, LoraInjectError, within
from lora_inject.formats.peft.name_patterns import ends, matching_in_time, values_of

_MERGE = "Merge it into the base with PEFT (merge_and_unload) and start from that model"
_AS_LORA = "Only LoRA is supported; PEFT converts an adapter: peft.convert_to_lora, since 0.19"

UNSUPPORTED = {
    "alora_invocation_tokens": ("an activated LoRA (aLoRA), active for some tokens only", _MERGE),
    "arrow_config": ("an Arrow router over several adapters", "Use routed(model, rows) with them"),
    "kasa_config": ("a KaSA adapter, which changes the base", _MERGE),
    "layer_replication": ("for a model with replicated layers", "Build that model first"),
    "megatron_config": ("for Megatron's parallel layers", "Gather it into a plain one"),
    "monteclora_config": ("a MonteCLoRA adapter", _MERGE),
    "use_bdlora": ("a block-diagonal LoRA (BD-LoRA)", _MERGE),
    "use_qalora": ("a QALoRA adapter with pooled inputs", _MERGE),
    "velora_config": ("a VeLoRA adapter, with a backward pass of its own", _MERGE),
}
"""Field: what it is, and what to do. Empty values are ignored."""

_NOT_NEEDED = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode"),
    *("loftq_config", "lora_ga_config", "megatron_core", "peft_type", "qalora_group_size"),
    *("revision", "runtime_config"),
}
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Task to the names of heads that PEFT keeps whole without being told (peft_model.py)."""

LAYOUTS_OF_B = ("rank_major", "grouped_by_expert")
"""How unsloth has ordered the columns of a stack's B: as PEFT does, or by expert first."""


def _distinct(rows: list[int]) -> list[int]:
    if len(set(rows)) < len(rows):
        raise ValueError(f"{rows[:8]} has a row twice", "Name each once")
    return rows


Regex = Annotated[str, AfterValidator(checked_regex)]
Rank = Annotated[int, Field(ge=1, lt=2**63)]
Alpha = Annotated[float, Field(gt=0, le=1e38)]  # what float32 can hold
Index = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(min_length=1)]
Rows = Annotated[list[Index], Field(min_length=1), AfterValidator(_distinct)]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]


class LoraFields(BaseModel):
    """The fields that say something.

    A field that is missing, null or empty has its default. `r` may be missing in a file, whose
    tensors say it.
    """

    model_config = ConfigDict(strict=True, frozen=True, defer_build=True)  # few processes read one

    r: Rank | None = None
    lora_alpha: Alpha | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | str = True
    target_modules: Regex | list[str] | None = None
    target_parameters: list[Name] = []
    exclude_modules: Regex | list[str] | None = None
    modules_to_save: list[Name] = []
    layers_pattern: Identifier | list[Identifier] = []
    layers_to_transform: Index | list[Index] = []
    rank_pattern: dict[Regex, Rank] = {}
    alpha_pattern: dict[Regex, Alpha] = {}
    trainable_token_indices: Rows | dict[str, Rows] = {}
    lora_B_layout: Literal["rank_major", "grouped_by_expert"] | None = None  # noqa: N815
    peft_version: str | None = None
    task_type: str | None = None

    @property
    def scaling(self) -> str:
        """The scaling as a site's spec calls it."""
        return "rslora" if self.use_rslora else "standard"

    @property
    def version(self) -> tuple[int, int] | None:
        """The version of PEFT that the file states, `(major, minor)`."""
        match = re.match(r"([0-9]{1,5})\.([0-9]{1,5})(?:\.|$)", self.peft_version or "")
        return match and (int(match[1]), int(match[2]))

    @property
    def takes_every_stack_turned(self) -> bool:
        """Whether each stack of experts was taken for (experts, in, out), as by PEFT until 0.18.

        Since then those are whose module has `is_transposed`.
        """
        return self.version is not None and self.version < (0, 19)

    @property
    def layers(self) -> list[int]:
        """The layers to transform; empty for all."""
        given = self.layers_to_transform
        return [given] if isinstance(given, int) else given

    @property
    def lists_of_layers(self) -> list[str]:
        """The names of the lists whose layers are counted."""
        given = self.layers_pattern
        return [given] if isinstance(given, str) else given

    def divisor(self, rank: float) -> float:
        """What alpha is divided by, to give the scale of tensors of this rank."""
        return math.sqrt(rank) if self.use_rslora else rank

    def require_alpha(self, asked: str = "") -> None:
        """Refuse a file that does not say alpha."""
        if self.lora_alpha is None:
            remedy = "Ask the author of the adapter; it is never guessed"
            raise FormatError(asked, "'lora_alpha' is missing", remedy)

    def numbers(self, names: Collection[str]) -> dict[str, tuple[int | None, float]]:
        """The rank and the alpha of each name: those of the first key of a table that hits it."""
        with within("'rank_pattern'"):
            ranks = values_of(self.rank_pattern, names, self.r)
        with within("'alpha_pattern'"):
            alphas = values_of(self.alpha_pattern, names, self.lora_alpha)
        return {name: (ranks[name], float(alphas[name] or 0)) for name in names}

    def left_out(self, names: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yield the modules that PEFT does not adapt, each with the field that says so."""
        excluded = self._hit(self.exclude_modules, names, "exclude_modules")
        targets = self.target_modules
        nothing_said = targets is None and not self.target_parameters  # PEFT goes by the model then
        any_name = nothing_said or str(targets).lower() == "all-linear"
        targeted = {*names} if any_name else self._hit(targets, names, "target_modules")
        layers = {*names} if isinstance(targets, str) else self._in_layers(names)
        saved = {*self.modules_to_save}
        for name in names:
            if name in excluded:
                yield name, "exclude_modules"
            elif any(not saved.isdisjoint(ends(m)) for m in around([f"{name}.weight"])):
                yield name, "modules_to_save"
            elif name not in targeted:
                yield name, "target_modules"
            elif name not in layers:
                yield name, "layers_to_transform"

    def _hit(self, said: str | list[str] | None, names: Collection[str], field: str) -> set[str]:
        """Return the names that are listed, end so after a dot, or match an expression in whole."""
        if isinstance(said, str):
            return {*matching_in_time(whole(said), names, repr(field))}
        listed = {*(said or ())}
        return {name for name in names if not listed.isdisjoint(ends(name))}

    def _in_layers(self, names: Collection[str]) -> set[str]:
        """Return the names whose first number after a list's name is that of a layer to transform.

        PEFT looks at no layer where a target is a whole name.
        """
        if not self.layers:
            return {*names}
        starts = [rf"(?:^|.*?\.){name}\." for name in self.lists_of_layers] or [r".*?\.[^.]*\."]
        found = {n: [re.match(rf"{start}(\d+)\.", n) for start in starts] for n in names}
        first = {name: next(filter(None, matches), None) for name, matches in found.items()}
        inside = {name for name, match in first.items() if match and int(match[1]) in self.layers}
        return inside | ({*names} & {*(self.target_modules or ())})


def whole(regex: str) -> str:
    """Return a pattern for a regex of PEFT's for whole names, whose flags hold for itself only."""
    first = re.match(r"(?:\(\?[imsx]+\))*", regex)
    end = first.end() if first else 0
    flags = "".join(sorted({*regex[:end]} - {*"(?)"}))
    return f"^(?{flags}:{regex[end:]}" + ("\n)" if "x" in flags else ")")  # ends a comment


def read_fields(
    config: Mapping[str, Any],
    asked: str = "",
    error: type[LoraInjectError] = FormatError,
    allow: Collection[str] = (),
) -> LoraFields:
    """Return the fields of a LoraConfig's plain data; refuse others that are set, first.

    Args:
        config: The data, of any source.
        asked: What messages call it.
        error: The class of the errors.
        allow: Fields to accept although they are unknown or not supported.
    """

    def refused(field: str, problem: str, remedy: str) -> LoraInjectError:
        return error(f"{asked}, '{field}'" if asked else f"'{field}'", problem, remedy)

    plain = {name: _plain(value) for name, value in config.items()}
    plain = {name: value for name, value in plain.items() if value not in (None, [], {})}
    if (kind := plain.get("peft_type")) != "LORA":
        raise refused("peft_type", f"it is {str(kind)[:40]!r}, not 'LORA'", _AS_LORA)
    for name, (what, remedy) in UNSUPPORTED.items():
        if plain.get(name) and name not in allow:
            raise refused(name, f"it is {what}", remedy)
    known = {*LoraFields.model_fields, *_NOT_NEEDED, *UNSUPPORTED, *allow}
    if unknown := sorted(str(name) for name in plain.keys() - known if plain[name]):
        problem = f"the fields {one_line(unknown)} of PEFT are not known here"
        remedy = "Where they do not change what the tensors mean, leave them out, or read the file "
        raise refused(unknown[0], problem, f"{remedy}with allow={unknown[:3]}")
    try:
        return LoraFields.model_validate(plain)
    except ValidationError as invalid:
        fault = invalid.errors()[0]
        name, found, remedy = str(fault["loc"][0]), fault["msg"], "Correct it"
        if fault["type"] == "value_error":
            found, remedy = fault["ctx"]["error"].args
        raise refused(name, f"it is {str(plain[name])[:80]!r}: {found}", remedy) from None


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: PEFT's objects hold sets and members of enumerations."""
    value = value.value if isinstance(value, Enum) else value
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else value
