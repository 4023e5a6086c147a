"""What the user asked for: the config as a value, from YAML, a dict or keyword arguments.

There is one schema, and every way in goes through it. YAML is composed into nodes first
and validated as plain data second, so that whatever is wrong is reported at its line and column, in
the file's own words, with the nearest spelling that would be right. A config that exists is valid.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, cast, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from lora_inject.errors import ConfigError, nearest
from lora_inject.spec.yaml import MAX_TEXT_BYTES, Document, Dumper, Loc, dotted, show

Init = Literal["kaiming", "gaussian", "pissa", "olora"]
Scaling = Literal["standard", "rslora"]
Compute = Literal["base", "float32"]
Bias = Literal["none", "adapted", "all"]
Layout = Literal["out_in", "in_out"]

M = TypeVar("M", bound=BaseModel)

_ALSO = 4  # further faults that one message lists


# What a value may be


def _fault(found: str, remedy: str, at: Loc = ()) -> PydanticCustomError:
    """A fault in this package's words; `at` is the way to it below the validated field."""
    # The template is a constant and the words travel in the context: a `{` in them is no field.
    return PydanticCustomError("lora", "{found}", {"found": found, "remedy": remedy, "at": at})


def _read_pattern(pattern: str) -> str:
    if not pattern:
        raise _fault("the pattern is empty", "Write a regex that matches the end of a dotted name")
    if not pattern.isascii() and any("\ud800" <= character <= "\udfff" for character in pattern):
        raise _fault("the pattern is not valid Unicode", "Write it as UTF-8 text")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "possible nested set" and the like mean a mistake
            compiled = re.compile(pattern)
    except re.error as error:
        where = "" if error.pos is None else f" at position {error.pos}"
        raise _fault(f"'{pattern}' is no regex: {error.msg}{where}", _REGEX_HELP) from None
    except (OverflowError, RecursionError, Warning) as error:
        raise _fault(f"'{pattern}' is no regex: {error}", _REGEX_HELP) from None
    if compiled.fullmatch("") and pattern != "^$":  # which names the root module, on purpose
        remedy = "Write what must be there; '.+' matches every name, '^$' the root"
        raise _fault(f"'{pattern}' also matches an empty name, so it says nothing", remedy)
    return pattern


_REGEX_HELP = "Patterns are Python regexes; a literal dot is '\\.'"


def _read_version(value: Any, _read: ValidatorFunctionWrapHandler) -> Literal[1]:
    if isinstance(value, int) and not isinstance(value, bool) and value == 1:
        return 1
    raise _fault(f"{show(value)} is no version of this schema that this library knows", "Write 1")


def _read_list(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    if isinstance(value, (list, tuple)):
        return read(tuple(value))
    remedy = f"Write a list: [{value}]" if isinstance(value, str) else "Write a list"
    raise _fault(f"{show(value)} is no list", remedy)


def _read_inner(model: type[M], value: Any) -> M:
    """Validate a model inside a model, whose faults the outer one reports with its own."""
    data = dict(value) if isinstance(value, Mapping) else value
    return model.model_validate(data, context=_INNER)


def _read_init(value: Any, _read: ValidatorFunctionWrapHandler) -> Any:
    if isinstance(value, (Mapping, Normal)):
        return _read_inner(Normal, value)
    names = get_args(Init)
    if isinstance(value, str):
        if value in names:
            return value
        raise _fault(*_unknown_choice(value, names))
    raise _fault(f"{show(value)} is no init", f"Write {', '.join(names)} or {{normal: 0.02}}")


def _read_rule(value: Any, _read: ValidatorFunctionWrapHandler) -> Rule:
    if isinstance(value, str):
        value = {"match": value}
    if isinstance(value, (Mapping, Rule)):
        return _read_inner(Rule, value)
    remedy = "Write a pattern in single quotes, or a mapping with 'match'"
    raise _fault(f"{show(value)} is no rule", remedy)


def _read_expect(value: Any, _read: ValidatorFunctionWrapHandler) -> Expect | None:
    return None if value is None else _read_inner(Expect, value)


Sizes = tuple[tuple[str, int], ...] | tuple[str, ...]


def _read_slices(value: Any, _read: ValidatorFunctionWrapHandler) -> Sizes | None:
    if value is None:
        return None
    if not isinstance(value, (Mapping, list, tuple)):
        remedy = "Write {q: 768, k: 768, v: 768}, or [q, k, v] for equal parts"
        raise _fault(f"{show(value)} are no slices", remedy)
    if len(value) < 2:
        raise _fault("fewer than two slices", "A site that is adapted whole needs no slices")
    keyed = isinstance(value, Mapping)
    names = [_read_slice_name(name, (name if keyed else i,)) for i, name in enumerate(value)]
    if isinstance(value, Mapping):
        return tuple((name, _read_width(value[name], name)) for name in names)
    if twice := _first_double(names):
        raise _fault(f"the slice '{twice}' is named twice", "Give each part its own name")
    return tuple(names)


def _read_slice_name(name: Any, at: Loc) -> str:
    if isinstance(name, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        return name
    raise _fault(f"{show(name)} is no slice name", "Use letters, digits and '_'", at)


def _read_width(width: Any, name: str) -> int:
    if isinstance(width, int) and not isinstance(width, bool) and width >= 1:
        return width
    raise _fault(
        f"{show(width)} is no width", "Write the slice's outputs, an integer >= 1", (name,)
    )


def _write_slices(slices: Sizes | None) -> Any:
    if slices and isinstance(slices[0], tuple):
        return dict(slices)
    return slices


def _first_double(names: Sequence[str]) -> str | None:
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


_SLICES_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "additionalProperties": {"type": "integer", "minimum": 1},
            "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
            "minProperties": 2,
        },
        {
            "type": "array",
            "items": {"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
            "minItems": 2,
            "uniqueItems": True,
        },
    ]
}

Pattern = Annotated[str, AfterValidator(_read_pattern)]
Names = Annotated[tuple[Pattern, ...], WrapValidator(_read_list)]
Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Dropout = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]

_RANK = "r: rows of A and columns of B. At most the smaller side of the weight it updates."
_ALPHA = "alpha: the update is scaled by alpha / rank (or alpha / sqrt(rank) with rslora)."
_DROPOUT = "Probability of dropping an element of the input of A, in training only."
_INIT = (
    "How A starts (B starts at zero). kaiming: uniform, a = sqrt(5), as the paper's code. "
    "gaussian: N(0, 1/rank), a standard deviation of 1/rank, as PEFT. {normal: std}: N(0, std). "
    "pissa, olora: A and B from the singular vectors or the QR factors of W, which is not written."
)
_SCALING = "standard: alpha / rank. rslora: alpha / sqrt(rank)."
_COMPUTE = "base: low-rank arithmetic in the base's dtype. float32: in float32."


# The schema

_INNER = "inner"  # validation context of a model inside a model: the outer one reports its faults


class _Strict(BaseModel):
    """Unknown keys and wrong types are errors; an integer may stand where a float is meant."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="wrap")
    @classmethod
    def _report(
        cls, data: Any, read: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        """Turn pydantic's report into a `ConfigError`, once, at the outermost model."""
        try:
            made = read(data)
            made._check()
        except (ValidationError, PydanticCustomError) as error:
            if info.context == _INNER:
                raise
            document = info.context if isinstance(info.context, Document) else None
            raise _config_error(error, cls, document) from None
        return made

    def _check(self) -> None:
        """Check what several fields say together; raise a `_fault`."""


class Normal(_Strict):
    """`init: {normal: std}`: A starts as N(0, std) and B as zero.

    Attributes:
        normal: Standard deviation, above 0.
    """

    normal: float = Field(gt=0, allow_inf_nan=False, description="Standard deviation of A.")

    if TYPE_CHECKING:

        def __init__(self, *, normal: float) -> None: ...


class Rule(_Strict):
    r"""One entry of `targets`: a pattern, and what differs from the config's defaults.

    Attributes:
        match: Regex that must match the end of a canonical dotted name, from a dot or its start.
        rank: r of the sites that it matches, None for the config's; likewise the next five.
        alpha: alpha.
        dropout: Probability of dropping an element of the input of A.
        init: How A and B start.
        scaling: `standard` or `rslora`.
        compute: `base` or `float32`.
        slices: Parts of a fused projection along its output: `(name, width)` pairs, or names for
            equal parts.
        adapt: Names of the slices that are adapted.
        layout: Orientation of a parameter's last two dimensions, where it must be said.

    Raises:
        ConfigError: A value is wrong; the message names the key.

    Example:
        >>> rule = Rule(match=r"attn\.c_attn", slices=["q", "k", "v"], adapt=["q", "v"], rank=4)
        >>> rule.slices, rule.adapt
        (('q', 'k', 'v'), ('q', 'v'))
    """

    match: Pattern = Field(
        description="Python regex; must match the end of a dotted name, from a dot or its start. "
        "In YAML, write it in single quotes."
    )
    rank: Rank | None = Field(None, description=_RANK)
    alpha: Alpha | None = Field(None, description=_ALPHA)
    dropout: Dropout | None = Field(None, description=_DROPOUT)
    init: Annotated[Init | Normal, WrapValidator(_read_init)] | None = Field(
        None, description=_INIT
    )
    scaling: Scaling | None = Field(None, description=_SCALING)
    compute: Compute | None = Field(None, description=_COMPUTE)
    slices: Annotated[
        Sizes | None,
        WrapValidator(_read_slices),
        PlainSerializer(_write_slices),
        WithJsonSchema(_SLICES_SCHEMA),
    ] = Field(
        None,
        description="Parts of a fused projection along its output, in order: widths by name, or "
        "a list of names for equal parts.",
    )
    adapt: Annotated[tuple[str, ...], WrapValidator(_read_list)] | None = Field(
        None, description="Names of the slices to adapt; the others keep a delta of exactly zero."
    )
    layout: Layout | None = Field(
        None,
        description="For parameters: out_in if the last two dimensions are (out, in), used as "
        "x @ W.T (Mixtral, Qwen); in_out if (in, out), used as x @ W (GPT-OSS, Llama 4).",
    )

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            match: str,
            rank: int | None = None,
            alpha: float | None = None,
            dropout: float | None = None,
            init: Init | Normal | Mapping[str, float] | None = None,
            scaling: Scaling | None = None,
            compute: Compute | None = None,
            slices: Mapping[str, int] | Sequence[str] | None = None,
            adapt: Sequence[str] | None = None,
            layout: Layout | None = None,
        ) -> None: ...

    @property
    def slice_names(self) -> tuple[str, ...]:
        """Names of the slices in the order of the output; empty without slices."""
        return tuple(part if isinstance(part, str) else part[0] for part in self.slices or ())

    def _check(self) -> None:
        if self.slices is None and self.adapt is None:
            return
        if self.slices is None:
            remedy = "Add slices: [q, k, v], or their sizes; without slices the whole is adapted"
            raise _fault("'adapt' names slices, but there are no 'slices'", remedy, ("adapt",))
        if not self.adapt:
            remedy = f"Add adapt: with some of {', '.join(self.slice_names)}"
            raise _fault("'slices' are given, but not which of them to adapt", remedy, ("slices",))
        for i, name in enumerate(self.adapt):
            if name not in self.slice_names:
                remedy = f"The slices are {', '.join(self.slice_names)}"
                raise _fault(f"there is no slice '{name}'", remedy, ("adapt", i))
        if twice := _first_double(self.adapt):
            raise _fault(f"'{twice}' is named twice", "Name each slice once", ("adapt",))


class Expect(_Strict):
    """Counts that must come out, or inject fails before it changes anything.

    Attributes:
        sites: Number of sites.
        lora: Elements of all A and B.
        trainable: `lora` and the elements that `train` and `bias` add.
    """

    sites: Count | None = Field(None, description="Number of adapted sites.")
    lora: Count | None = Field(None, description="Elements of A and B of all sites.")
    trainable: Count | None = Field(
        None, description="Elements of A and B, and of what train and bias add."
    )

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            sites: int | None = None,
            lora: int | None = None,
            trainable: int | None = None,
        ) -> None: ...

    def _check(self) -> None:
        if self.sites is None and self.lora is None and self.trainable is None:
            raise _fault("nothing is expected", "Give sites, lora or trainable, or leave it out")


@dataclass(frozen=True, slots=True)
class Hyper:
    """The hyper-parameters of one rule, the config's defaults filled in.

    Attributes:
        rank: r.
        alpha: alpha.
        dropout: Probability of dropping an element of the input of A.
        init: A name of `Init`, or `("normal", std)`, as `sites.SiteSpec` has it.
        scaling: `standard` or `rslora`.
        compute: `base` or `float32`.
    """

    rank: int
    alpha: float
    dropout: float
    init: str | tuple[str, float]
    scaling: Scaling
    compute: Compute


class Config(_Strict):
    r"""Which parts of a model get which adapters.

    Attributes:
        version: Version of this schema: 1.
        rank: r of every rule that does not give its own; likewise the next five.
        alpha: alpha.
        dropout: Probability of dropping an element of the input of A.
        init: `kaiming`, `gaussian` (standard deviation 1/rank, as PEFT), `Normal(normal=std)`,
            `pissa` or `olora`.
        scaling: `standard` (alpha / rank) or `rslora` (alpha / sqrt(rank)).
        compute: `base` or `float32`, the dtype of the low-rank arithmetic.
        targets: Rules in order, the first match wins. A string is the rule that only matches.
        exclude: Patterns of names that no rule may take, with all that lies below them.
        train: Patterns of further parameters, or modules, that train and travel with the adapter.
        bias: Which biases train: `none`, `adapted` (of the adapted modules) or `all`.
        expect: Counts that must come out, or None.

    Raises:
        ConfigError: Anything is wrong; the message names the place and the nearest valid spelling.

    Example:
        >>> config = Config(rank=4, targets=["q_proj", Rule(match="v_proj", rank=8)])
        >>> [config.hyper(rule).rank for rule in config.targets]
        [4, 8]
        >>> Config.from_text(config.to_yaml()) == config
        True
    """

    model_config = ConfigDict(title="lora_inject config")

    version: Annotated[Literal[1], WrapValidator(_read_version)] = Field(
        1, description="Version of this schema."
    )
    rank: Rank = Field(8, description=_RANK)
    alpha: Alpha = Field(16.0, description=_ALPHA)
    dropout: Dropout = Field(0.0, description=_DROPOUT)
    init: Annotated[Init | Normal, WrapValidator(_read_init)] = Field("kaiming", description=_INIT)
    scaling: Scaling = Field("standard", description=_SCALING)
    compute: Compute = Field("base", description=_COMPUTE)
    targets: Annotated[
        tuple[Annotated[Rule, WrapValidator(_read_rule)], ...], WrapValidator(_read_list)
    ] = Field((), description="What to adapt: rules in order, the first match wins.")
    exclude: Names = Field(
        (), description="Names that no rule may take, with all that lies below them."
    )
    train: Names = Field(
        (), description="Further parameters, or modules, that train and travel with the adapter."
    )
    bias: Bias = Field(
        "none", description="Which biases train too: none, those of adapted modules, or all."
    )
    expect: Annotated[Expect | None, WrapValidator(_read_expect)] = Field(
        None, description="Counts that must come out, or inject fails before any change."
    )

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            version: Literal[1] = 1,
            rank: int = 8,
            alpha: float = 16.0,
            dropout: float = 0.0,
            init: Init | Normal | Mapping[str, float] = "kaiming",
            scaling: Scaling = "standard",
            compute: Compute = "base",
            targets: Sequence[str | Rule | Mapping[str, Any]] = (),
            exclude: Sequence[str] = (),
            train: Sequence[str] = (),
            bias: Bias = "none",
            expect: Expect | Mapping[str, int] | None = None,
        ) -> None: ...

    def _check(self) -> None:
        if not self.targets and not self.train and self.bias == "none":
            remedy = "Add targets: with patterns such as 'q_proj' (or train:, or bias:)"
            raise _fault("nothing is asked for: no targets, no train, no bias", remedy)

    def hyper(self, rule: Rule) -> Hyper:
        """Return what holds for `rule`: its own values, else this config's.

        Args:
            rule: A rule of `targets`.

        Returns:
            The six hyper-parameters.

        Example:
            >>> Config(alpha=32, targets=["q"]).hyper(Rule(match="q", rank=2)).alpha
            32.0
        """
        init = self.init if rule.init is None else rule.init
        return Hyper(
            rank=self.rank if rule.rank is None else rule.rank,
            alpha=self.alpha if rule.alpha is None else rule.alpha,
            dropout=self.dropout if rule.dropout is None else rule.dropout,
            init=("normal", init.normal) if isinstance(init, Normal) else init,
            scaling=rule.scaling or self.scaling,
            compute=rule.compute or self.compute,
        )

    @classmethod
    def from_yaml(cls, path: str | PathLike[str]) -> Config:
        """Read a config from a YAML file.

        Args:
            path: The file, UTF-8.

        Returns:
            The config.

        Raises:
            ConfigError: The file cannot be read, is not safe YAML, or is no valid config; the
                message gives `FILE:LINE:COLUMN (key)`.
        """
        try:
            raw = Path(path).read_bytes()
        except OSError as error:
            found = error.strerror or str(error)
            raise ConfigError(str(path), found, "Give the path of a YAML file") from None
        if len(raw) > MAX_TEXT_BYTES:
            found = f"{len(raw):,} bytes, more than a config can have"
            raise ConfigError(str(path), found, "Give the path of a config, not of a checkpoint")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"byte {error.start} is not UTF-8"
            raise ConfigError(str(path), found, "Save the config as UTF-8 text") from None
        return cls.from_text(text, source=str(path))

    @classmethod
    def from_text(cls, text: str, *, source: str = "<config>") -> Config:
        r"""Read a config from YAML text.

        Args:
            text: The YAML.
            source: What messages call it.

        Returns:
            The config.

        Raises:
            ConfigError: As in `from_yaml`.

        Example:
            >>> Config.from_text("targets: [q_proj, v_proj]").rank
            8
            >>> try:
            ...     Config.from_text("rnak: 4\ntargets: [q_proj]", source="lora.yaml")
            ... except ConfigError as error:
            ...     print(error)
            lora.yaml:1:1 (rnak): unknown key 'rnak'. Did you mean 'rank'?
        """
        document = Document(text, source)
        return cls.model_validate(document.data, context=document)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """Make a config from plain data, as `to_dict` gives it.

        Args:
            data: Keys and values of the schema.

        Returns:
            The config.

        Raises:
            ConfigError: It is no valid config; the message names the key.
        """
        if not isinstance(data, Mapping):
            found = f"{show(data)} is no mapping"
            raise ConfigError("config", found, "Give a dict with the config's keys")
        return cls.model_validate(dict(data))

    @classmethod
    def coerce(cls, config: Config | Mapping[str, Any] | str | PathLike[str]) -> Config:
        """Return `config` as a `Config`, whatever it came as.

        Args:
            config: A `Config`, a dict, or the path of a YAML file.

        Returns:
            The config.

        Raises:
            ConfigError: It is none of these, or not valid.
        """
        if isinstance(config, Config):
            return config
        if isinstance(config, Mapping):
            return cls.from_dict(config)
        if isinstance(config, str) and "\n" in config:
            remedy = "Use Config.from_text for text; a str is the path of a file"
            raise ConfigError("config", "YAML text where a path is meant", remedy)
        if isinstance(config, (str, PathLike)):
            return cls.from_yaml(config)
        found = f"a value of type {type(config).__name__}"
        raise ConfigError("config", found, "Give a Config, a dict, or the path of a YAML file")

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain data for JSON and YAML.

        Returns:
            What `from_dict` turns into an equal config. A rule that only matches is a string;
            whole numbers are written as integers; what is not set is left out.

        Example:
            >>> Config(targets=["q_proj"]).to_dict()["targets"]
            ['q_proj']
        """
        data: dict[str, Any] = _tidy(self.model_dump(mode="json", exclude_none=True))
        data["targets"] = [r["match"] if len(r) == 1 else r for r in data["targets"]]
        return {key: value for key, value in data.items() if value != [] or key == "targets"}

    def to_yaml(self, path: str | PathLike[str] | None = None) -> str:
        """Return the config as YAML, and write it to `path` if one is given.

        Args:
            path: Where to write it, or None.

        Returns:
            The text; `from_text` gives back an equal config.

        Raises:
            ConfigError: The file cannot be written.
        """
        text = yaml.dump(
            self.to_dict(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1 << 16
        )
        if path is not None:
            try:
                Path(path).write_text(text, encoding="utf-8")
            except OSError as error:
                found = error.strerror or str(error)
                raise ConfigError(str(path), found, "Give a path that can be written") from None
        return text

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Return the JSON Schema (draft-07) of a config file, for editors and `lora-inject schema`.

        Returns:
            The schema as plain data. It says less than `Config` checks: patterns are only strings.

        Example:
            >>> sorted(Config.json_schema()["$defs"])
            ['Expect', 'Normal', 'Rule']
        """
        schema = cls.model_json_schema()
        items = schema["properties"]["targets"]["items"]
        pattern = {"type": "string", "minLength": 1, "description": "The rule that only matches."}
        schema["properties"]["targets"]["items"] = {"anyOf": [pattern, items]}
        head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": schema["title"]}
        plain = cast("dict[str, Any]", _plain_schema(schema))
        description = "Which parts of a model get which low-rank adapters (see the README)."
        return {**head, **plain, "description": description}


def _tidy(value: Any) -> Any:
    """Write whole floats as integers, as people do."""
    if isinstance(value, dict):
        return {key: _tidy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_tidy(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return int(value)
    return value


def _plain_schema(node: Any, *, names: bool = False) -> Any:
    """Drop what pydantic adds and an editor cannot use: titles, `null`, Python docstrings.

    Args:
        node: A part of the schema.
        names: True where the keys of `node` are names of properties, not words of JSON Schema.
    """
    if isinstance(node, list):
        return [_plain_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    if names:
        return {key: _plain_schema(item) for key, item in node.items()}
    drop = {"title"} | ({"description"} if "properties" in node else set())
    if node.get("default", "") is None:
        drop.add("default")
    kept = {key: item for key, item in node.items() if key not in drop}
    if "anyOf" in kept:  # null is how Python says "not given"; in a file the key is left out
        choices = [item for item in kept.pop("anyOf") if item != {"type": "null"}]
        kept = {**kept, **(choices[0] if len(choices) == 1 else {"anyOf": choices})}
    inner = ("properties", "$defs")
    return {key: _plain_schema(item, names=key in inner) for key, item in kept.items()}


# From pydantic's faults to this package's words


def _config_error(
    error: ValidationError | PydanticCustomError,
    model: type[_Strict],
    document: Document | None,
) -> ConfigError:
    """The first fault in the order of the text, and a line on each further one."""
    if isinstance(error, ValidationError):
        details = error.errors(include_url=False)
    else:
        details = [
            {"type": "lora", "loc": (), "ctx": error.context or {}, "msg": "", "input": None}
        ]
    faults = [_explain(detail, model, document) for detail in details]
    faults.sort(key=lambda fault: fault.order)
    first, *others = faults
    remedy = first.remedy
    if others:
        end = "" if remedy.endswith((".", "?", "!")) else "."
        listed = "; ".join(f"{fault.place}: {fault.found}" for fault in others[:_ALSO])
        more = f"; and {len(others) - _ALSO} more" if len(others) > _ALSO else ""
        remedy = f"{remedy}{end} Also: {listed}{more}"
    return ConfigError(first.place, first.found, remedy)


@dataclass(frozen=True, slots=True)
class _Fault:
    place: str
    found: str
    remedy: str
    order: tuple[bool, int, int] = (False, 0, 0)


def _explain(detail: ErrorDetails, model: type[_Strict], document: Document | None) -> _Fault:
    """One of pydantic's faults with its place, what was found, and what to do."""
    context = detail.get("ctx", {})
    path = (*detail["loc"], *context.get("at", ()))
    kind, value = detail["type"], detail["input"]
    if kind == "lora":
        found, remedy = context["found"], context["remedy"]
    elif kind == "extra_forbidden":
        found, remedy = _unknown_key(path, model)
    elif kind == "missing":
        found = f"'{path[-1]}' is missing"
        remedy = f"Add {path[-1]}: with its value"
        path = path[:-1]
    elif kind == "literal_error":
        choices = re.findall(r"\w+", str(context["expected"]).replace(" or ", " "))
        found, remedy = _unknown_choice(value, choices)
    elif kind in _WORDS:
        wanted, remedy = (words.format(**context) for words in _WORDS[kind])
        found = f"{show(value)} is {wanted}"
    else:
        found, remedy = detail["msg"], "See the schema: lora-inject schema"
    if document is None:
        outer = "config" if model is Config else model.__name__
        place = f"{outer} ({dotted(path)})" if path else outer
        return _Fault(place, found, remedy, (kind == "missing", 0, 0))
    at_key = kind == "extra_forbidden"
    if not at_key and (hint := document.hint(path)):
        remedy = f"{remedy} ({hint})"
    order = (kind == "missing", *document.order(path))  # a misspelt key explains a missing one
    return _Fault(document.place(path, key=at_key), found, remedy, order)


_WORDS = {
    "int_type": ("not an integer", "Write a whole number"),
    "float_type": ("not a number", "Write a number"),
    "string_type": ("not a string", "Write it in single quotes"),
    "invalid_key": ("no key", "Keys are strings"),
    "greater_than": ("not above {gt:g}", "Write a number above {gt:g}"),
    "greater_than_equal": ("below {ge:g}", "Write a number of at least {ge:g}"),
    "less_than": ("not below {lt:g}", "Write a number below {lt:g}"),
    "finite_number": ("not finite", "Write a finite number"),
    "model_type": ("no mapping", "Write keys and values"),
}


def _unknown_key(path: Loc, model: type[_Strict]) -> tuple[str, str]:
    """What to write instead of a key that there is not."""
    key = str(path[-1])
    here = model if len(path) == 1 else _BELOW.get(str(path[0]), Rule)
    if "init" in path[:-1]:
        here = Normal
    found = f"unknown key '{key}'"
    for other, where in ((Config, "the top level"), (Rule, "an entry of targets")):
        if key in other.model_fields and key not in here.model_fields:
            return found, f"'{key}' belongs in {where}"
    meant = _ELSEWHERE.get(key)
    known = [meant] if meant in here.model_fields else nearest(key, here.model_fields, n=1)
    if known:
        return found, f"Did you mean '{known[0]}'?"
    return found, f"The keys are {', '.join(here.model_fields)}"


_BELOW: dict[str, type[_Strict]] = {"targets": Rule, "expect": Expect, "init": Normal}

# What the same thing is called in PEFT and elsewhere.
_ELSEWHERE = {
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "init",
    "use_rslora": "scaling",
    "target_modules": "targets",
    "target_parameters": "targets",
    "rules": "targets",
    "exclude_modules": "exclude",
    "modules_to_save": "train",
    "modules": "sites",
    "pattern": "match",
    "name": "match",
    "regex": "match",
    "std": "normal",
}


def _unknown_choice(value: Any, choices: Sequence[str]) -> tuple[str, str]:
    """What to write instead of a word that is none of the choices."""
    found = f"{show(value)} is not one of {', '.join(choices)}"
    near = nearest(value.lower(), choices, n=1) if isinstance(value, str) else []
    return found, f"Did you mean '{near[0]}'?" if near else f"Write {' or '.join(choices)}"
