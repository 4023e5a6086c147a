"""The config: what the user asks for, as a value, from YAML, a dict or keyword arguments.

pydantic checks it, and each error is told at its line and column (`spec.reading`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    model_validator,
)

from lora_inject.core.spec.names import meant, show
from lora_inject.core.spec.patterns import INDEX, layer_range
from lora_inject.core.spec.reading import Strict, YamlModel, written
from lora_inject.core.spec.regexes import checked_regex
from lora_inject.core.spec.sites import InitName
from lora_inject.core.spec.tables import Shown
from lora_inject.core.spec.variants import VARIANTS
from lora_inject.errors import ConfigError, user_path

ALL_LINEAR = "all-linear"
ALL_EXPERTS = "all-experts"
WORDS = frozenset({ALL_LINEAR, ALL_EXPERTS})  # rules that are no pattern

CONFIGS = Path(__file__).parents[2] / "configs"
"""Configs of model families, and `schema.json`, which `scripts/schema.py` writes."""

# What a value may be.


def _check_pattern(pattern: str) -> str:
    matches_nothing = re.fullmatch(checked_regex(pattern), "")
    if matches_nothing and pattern != "^$":  # which names the root module, on purpose
        remedy = "Write what must be there; '.+' matches every name, '^$' the root"
        raise ValueError(f"{show(pattern)} also matches an empty name", remedy)
    return pattern


def _read_layers(value: object) -> tuple[object, ...]:
    layers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return layers or (layer_range(value),)  # which refuses an empty list


def _check_distinct(names: tuple[object, ...]) -> tuple[object, ...]:
    if len(set(names)) < len(names):
        raise ValueError(f"{show(list(names))} has a repeated entry", "Write each once")
    return names


def _check_variant(name: str) -> str:
    if name not in VARIANTS:
        raise ValueError(f"there is no variant {show(name)}", meant(name, VARIANTS))
    return name


def _read_list(value: object) -> tuple[object, ...]:
    if not isinstance(value, (list, tuple)):  # a set has no order
        inside = sorted(map(str, value)) if isinstance(value, (set, frozenset)) else [str(value)]
        remedy = f"Write a list: [{', '.join(inside)}]"
        raise ValueError(f"{show(value)} is not a list", remedy)  # noqa: TRY004 - as pydantic wants
    return tuple(value)


T = TypeVar("T")
_List = BeforeValidator(_read_list)
Distinct = AfterValidator(_check_distinct)
Some = Annotated[tuple[T, ...], Field(min_length=1), _List, Distinct]

_LAYER = {"type": ["integer", "string"], "minimum": 0, "pattern": f"^{INDEX}(-{INDEX})?$"}

Pattern = Annotated[str, AfterValidator(_check_pattern)]
Patterns = Annotated[tuple[Pattern, ...], _List]
Count = Annotated[int, Field(ge=0)]
Number = Annotated[
    float,
    Field(allow_inf_nan=False, le=1e38),  # what float32 can hold
    PlainSerializer(lambda x: int(x) if x.is_integer() and abs(x) < 1e15 else x, int | float),
]
Layers = Annotated[
    tuple[Annotated[str, BeforeValidator(layer_range)], ...],
    BeforeValidator(_read_layers),
    PlainSerializer(lambda texts: [int(t) if t.isdecimal() else t for t in texts]),
    WithJsonSchema({"anyOf": [_LAYER, {"type": "array", "items": _LAYER, "minItems": 1}]}),
]
Indices = Some[Count]
SliceName = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$")]
Parts = Annotated[
    Some[SliceName]
    | Annotated[
        dict[SliceName, Annotated[int, Field(ge=1)]],
        Field(min_length=1),
        AfterValidator(lambda widths: tuple(widths.items())),  # hashable, and the order counts
    ],
    PlainSerializer(lambda parts: dict(parts) if isinstance(parts[0], tuple) else parts),
]

Tokens = Annotated[
    dict[Pattern, Indices],
    BeforeValidator(lambda value: dict(value) if isinstance(value, tuple) else value),
    AfterValidator(lambda ids: tuple(ids.items())),  # hashable
    PlainSerializer(lambda ids: dict(ids)),  # noqa: PLW0108 - pydantic 2.7 needs a signature
    Field(json_schema_extra={"default": {}}),
]

# The hyper-parameters: fields of a config, with defaults, and of a rule, which may override them.

Rank = Annotated[int, Field(ge=1, le=1 << 20, description="r: rows of A and columns of B.")]
Alpha = Annotated[
    Number,
    Field(gt=0, description="The update is scaled by alpha / rank (rslora: alpha / sqrt(rank))."),
]
Dropout = Annotated[
    Number,
    Field(ge=0, lt=1, description="Probability of dropping an input of A, in training only."),
]
Scaling = Annotated[
    Literal["standard", "rslora"],
    Field(description="standard: alpha / rank. rslora: alpha / sqrt(rank)."),
]
Compute = Annotated[
    Literal["base", "float32"],
    Field(description="base: low-rank arithmetic in the base's dtype. float32: in float32."),
]
Variant = Annotated[
    str,
    AfterValidator(_check_variant),
    Field(description="How A and B become an update of W: lora, or another variant's name."),
]


class Normal(Strict):
    """`init: {normal: std}`: A starts as N(0, std) and B as zero."""

    normal: Annotated[Number, Field(gt=0)]
    """Standard deviation of A."""


class Axes(Strict):
    """`layout: {in: [0], out: [1, 2]}`: which axes of a parameter are inputs and which outputs."""

    in_: Indices = Field(alias="in")
    """Axes that are summed over, in order."""
    out: Indices
    """Axes of the result, in order. Axes in neither list count stacked matrices."""


Init = Annotated[
    InitName | Normal,
    Field(
        description="How A starts (B starts at zero). kaiming: uniform, a = sqrt(5), as the "
        "paper's code. gaussian: N(0, 1/rank), a standard deviation of 1/rank. "
        "{normal: std}: N(0, std). pissa, olora: A and B from the singular vectors or the QR "
        "factors of W, which is not written."
    ),
]
Layout = Literal["out_in", "in_out"] | Axes


class Active(Strict):
    """`rank: {active: 32}`: a rank that is shared by the experts that a token goes to."""

    active: Rank
    """The rank of all of these together, divided by their number."""


class Rule(Strict):
    r"""One entry of `targets`: what it matches, and values that differ from the config's.

    Raises:
        ConfigError: A value is wrong; the message names the key.

    Examples:
        >>> rule = Rule(match=r"attn\.c_attn", slices=["q", "k", "v"], adapt=["q", "v"], rank=4)
        >>> rule.slices, rule.adapt
        (('q', 'k', 'v'), ('q', 'v'))
    """

    match: Pattern
    """Python regex; must match the end of a dotted name, from a dot or its start. In YAML, write it
    in single quotes. Or all-linear: every linear layer but the model's output head. Or all-experts:
    every expert that a router chooses; all-linear leaves these to it."""
    kind: str | None = Field(None, min_length=1)
    """Only sites of this kind: linear, conv1d, embedding, conv, parameter, ..."""
    layers: Layers | None = None
    """Only names whose first number is one of these: 16-31, 4, or a list of such."""
    rank: Rank | Active | None = None
    """The rank; or {active: 32} for experts: 32 divided by the number that a token goes to."""
    alpha: Alpha | None = None
    dropout: Dropout | None = None
    init: Init | None = None
    scaling: Scaling | None = None
    compute: Compute | None = None
    variant: Variant | None = None
    only: Indices | None = None
    """Of stacked experts, those of these numbers."""
    share: Literal["A", "B"] | None = None
    """What all experts of a stack have in common: A, or B."""
    slices: Parts | None = None
    """Parts of a fused projection along its output, in order: widths by name, or a list of names
    for equal parts."""
    adapt: Some[str] | None = None
    """Names of the slices to adapt; the others keep a delta of exactly zero."""
    layout: Layout | None = None
    """For parameters whose class does not state it: out_in if the last two dimensions are
    (out, in), used as x @ W.T (Mixtral, Qwen); in_out if (in, out), used as x @ W (GPT-OSS,
    Llama 4); or the axes of one matrix, {in: [0], out: [1, 2]}."""

    @property
    def widths(self) -> dict[str, int]:
        """The slices in the order of the output, with their widths; 0 of equal parts."""
        return dict((part, 0) if isinstance(part, str) else part for part in self.slices or ())

    @model_validator(mode="before")
    @classmethod
    def _from_pattern(cls, data: object) -> object:
        if isinstance(data, str):
            return {"match": data}
        if not isinstance(data, (Mapping, Rule)):
            remedy = "Write a pattern in single quotes, or a mapping with 'match'"
            raise ValueError(f"{show(data)} is not a rule", remedy)  # noqa: TRY004 - as pydantic wants
        if isinstance(data, Mapping) and ("top" in data or isinstance(data.get("only"), str)):
            remedy = "Give numbers, only: [0, 3]; docs/cookbook/chosen-experts.md counts them"
            raise ValueError("experts are not chosen by a file (only: FILE, top:)", remedy)
        return data

    @model_validator(mode="after")
    def _has_parts_that_fit(self) -> Self:
        names = self.widths
        if names and not self.adapt:
            remedy = f"Add adapt: with some of {', '.join(names)}"
            raise ValueError("slices are given, but not which of them to adapt", remedy)
        if odd := [name for name in self.adapt or () if name not in names]:
            remedy = f"The slices are {', '.join(names)}" if names else "Add slices: [q, k, v]"
            raise ValueError(f"there is no slice {show(odd[0])}", remedy)
        if self.share and self.only is not None:
            raise ValueError("share is for whole stacks, and only chooses of them", "Give one")
        return self


class HasFields(Protocol):
    """A `LoraConfig`, to a type checker."""

    def to_dict(self) -> dict[str, Any]: ...  # noqa: D102


class Expect(Strict):
    """Expected counts; inject raises an error before any change if one differs."""

    sites: Count | None = None
    """Number of adapted sites."""
    lora: Count | None = None
    """Elements of A and B of all sites."""
    trainable: Count | None = None
    """Elements of all that trains: A, B, what a variant adds, and train, tokens and bias."""

    @model_validator(mode="after")
    def _expects_something(self) -> Self:
        if self.sites is None and self.lora is None and self.trainable is None:
            raise ValueError("nothing is expected", "Give sites, lora or trainable")
        return self


HYPER = ("rank", "alpha", "dropout", "init", "scaling", "compute", "variant")
"""The hyper-parameters, which a rule may set."""


class Config(Shown, YamlModel):
    r"""Which parts of a model get which adapters.

    Raises:
        ConfigError: Anything is wrong; the message names the place and the nearest valid spelling.

    Examples:
        >>> config = Config(rank=4, targets=["q_proj", Rule(match="v_proj", rank=8)])
        >>> [config.filled(rule).rank for rule in config.targets]
        [4, 8]
        >>> Config.from_text(config.to_yaml()) == config
        True
    """

    model_config = ConfigDict(title="lora_inject config")
    inside: ClassVar = {
        "targets": Rule, "expect": Expect, "init": Normal, "layout": Axes, "rank": Active,
    }  # fmt: skip
    forms = "a Config, a dict, the path of a YAML file, or a LoraConfig"

    version: Literal[1] = 1
    """Version of this schema."""
    rank: Rank = 8
    alpha: Alpha = 16.0
    dropout: Dropout = 0.0
    init: Init = "kaiming"
    scaling: Scaling = "standard"
    compute: Compute = "base"
    variant: Variant = "lora"
    targets: Annotated[tuple[Rule, ...], _List] = ()
    """What to adapt: rules in order, the first match wins. A string is a rule's match."""
    exclude: Patterns = ()
    """Names that no rule may take, with all that lies below them."""
    train: Patterns = ()
    """Further parameters, or modules, that train and are saved with the adapter."""
    tokens: Tokens = ()  # type: ignore[assignment]
    """Rows of embeddings and heads, tied ones included, that train: a pattern, and the ids."""
    bias: Literal["none", "adapted", "all"] = "none"
    """Which biases train too: none, those of adapted modules, or all."""
    expect: Expect | None = None
    """Expected counts; inject raises an error before any change if one differs."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if not self.targets and not self.train and not self.tokens and self.bias == "none":
            remedy = "Add targets: with patterns such as 'q_proj' (or train:, tokens: or bias:)"
            raise ValueError("it selects nothing: no targets, no train, tokens or bias", remedy)
        return self

    def filled(self, rule: Rule) -> Rule:
        """Return a rule of `targets` with this config's values for those that it does not set.

        Examples:
            >>> Config(alpha=32, targets=["q"]).filled(Rule(match="q", rank=2)).alpha
            32.0
        """
        missing = [key for key in HYPER if getattr(rule, key) is None]
        return rule.model_copy(update={key: getattr(self, key) for key in missing})

    def label(self, i: int) -> str:
        """Return what messages call a rule of `targets`, by its place.

        Examples:
            >>> Config(targets=["q_proj"]).label(0)
            "rule 1 ('q_proj')"
        """
        return f"rule {i + 1} ('{self.targets[i].match}')"

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain data for JSON and YAML, without what is not set.

        A rule that only matches is a string; whole numbers are written as integers. `from_dict`
        gives back an equal config.

        Examples:
            >>> Config(targets=["q_proj"]).to_dict()["targets"]
            ['q_proj']
        """
        data = self.model_dump(mode="json", exclude_none=True, by_alias=True)
        data["targets"] = [r["match"] if len(r) == 1 else r for r in data["targets"]]
        default = [key for key, value in data.items() if value in ([], {}) or value is False]
        return {key: value for key, value in data.items() if key not in default or key == "targets"}

    @classmethod
    def from_yaml(cls, path: str | PathLike[str]) -> Self:
        """Read it from a YAML file, UTF-8, or by name a config of a model family in the package.

        Raises:
            ConfigError: The file cannot be read, is not safe YAML, or is not valid; the message
                gives `FILE:LINE:COLUMN (key)`.
        """
        there = user_path("read a config", path, ConfigError, "Give the path of a YAML file")
        families = {each.stem: each for each in sorted(CONFIGS.glob("*.yaml"))}
        # A model's folder may have the name of its family; Path raises if a name is too long.
        is_name = str(path).isidentifier() and not os.path.isfile(there)  # noqa: PTH113
        if is_name and str(path) not in families:
            problem = "there is no such file, and no family of models of this name in the package"
            raise ConfigError(show(str(path)), problem, meant(str(path), families))
        return super().from_yaml(families[str(path)] if is_name else path)

    def to_yaml(self) -> str:
        """Return the config as YAML, from which `from_text` makes an equal one."""
        return written(self.to_dict())

    def __str__(self) -> str:
        return self.to_yaml().rstrip()


ConfigLike = Config | Mapping[str, Any] | str | PathLike[str] | HasFields
"""Accepted forms of a config; see `formats.from_peft.config_of`."""
