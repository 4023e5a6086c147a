"""Strict models of pydantic: no unknown keys, no conversions, and errors in words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import Signature, signature
from os import PathLike
from typing import Any, ClassVar, Self, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from lora_inject.core.spec.names import nearest
from lora_inject.core.spec.words import Loc, dotted, show
from lora_inject.core.spec.yaml import Document, read_text
from lora_inject.errors import ConfigError, check_type


class Strict(BaseModel):
    """Unknown keys and wrong types are errors; an integer is accepted for a float."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )
    # models inside, by their key, where an unknown key may belong
    inside: ClassVar[Mapping[str, type[BaseModel]]] = {}

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise config_error(error, type(self), data) from None

    # As in pydantic's own BaseModel: a model inside a model is validated by the outer one.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Give the class a signature that says types; pydantic's says each of its validators."""
        super().__pydantic_init_subclass__(**kwargs)
        types = get_type_hints(cls)
        parameters = signature(cls).parameters.values()
        readable = [parameter.replace(annotation=types[parameter.name]) for parameter in parameters]
        cls.__signature__ = Signature(readable)


class YamlModel(Strict):
    """A model that is a YAML file as a whole; `forms` says what `coerce` takes."""

    forms: ClassVar[str]

    @classmethod
    def from_yaml(cls, path: str | PathLike[str]) -> Self:
        """Read it from a YAML file, UTF-8.

        Raises:
            ConfigError: The file cannot be read, is not safe YAML, or is not valid; the message
                gives `FILE:LINE:COLUMN (key)`.
        """
        return cls.from_text(read_text(path), source=str(path))

    @classmethod
    def from_text(cls, text: str, *, source: str = "") -> Self:
        r"""Read it from YAML text.

        Args:
            text: The YAML.
            source: Its name in messages.

        Raises:
            ConfigError: As in `from_yaml`.

        Examples:
            >>> from lora_inject import Config
            >>> Config.from_text("targets: [q_proj, v_proj]").rank
            8
            >>> try:
            ...     Config.from_text("rnak: 4\ntargets: [q_proj]", source="lora.yaml")
            ... except ConfigError as error:
            ...     print(error)
            lora.yaml:1:1 (rnak): unknown key 'rnak'. Did you mean 'rank'?
        """
        document = Document(text, source or f"<{cls.__name__.lower()}>")
        return cls._validated(document.data, document)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make it from plain data with the keys of the schema.

        Raises:
            ConfigError: It is not valid; the message names the key.
        """
        return cls._validated(dict(data) if isinstance(data, Mapping) else data)

    @classmethod
    def _validated(cls, data: Any, document: Document | None = None) -> Self:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise config_error(error, cls, data, document) from None

    @classmethod
    def coerce(cls, value: Any) -> Self:
        """Return a value of this class, a mapping, or the path of a YAML file as this class.

        Raises:
            ConfigError: It is none of these, or not valid.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        name = cls.__name__
        check_type(name.lower(), value, (str, PathLike), f"Give {cls.forms}", ConfigError)
        if isinstance(value, str) and "\n" in value:
            remedy = f"Use {name}.from_text for text; a str is the path of a file"
            raise ConfigError(name.lower(), "YAML text where a path is meant", remedy)
        return cls.from_yaml(value)


_ALSO = 4  # further errors that one message lists

_NAMES = {
    "rank": ("r", "lora_r"),
    "alpha": ("lora_alpha",),
    "dropout": ("lora_dropout",),
    "init": ("init_lora_weights",),
    "scaling": ("use_rslora",),
    "targets": ("target_modules", "target_parameters", "rules"),
    "exclude": ("exclude_modules",),
    "train": ("modules_to_save",),
    "layers": ("layers_to_transform",),
    "sites": ("modules",),
    "match": ("pattern", "name", "regex"),
    "normal": ("std",),
    "adapted": ("lora_only",),
    "lr": ("learning_rate",),
}
_OF_PEFT = re.compile("r|(lora|target|use|init_lora|exclude|modules_to|layers_to)_.+|peft_type")
_ELSEWHERE = {other: ours for ours, others in _NAMES.items() for other in others}
"""Names of the same thing elsewhere, to ours."""

_MAPPINGS = {"init": "{normal: 0.02}", "layout": "{in: [0], out: [1, 2]}"}


def config_error(
    error: ValidationError, cls: type[Strict], data: Any, document: Document | None = None
) -> ConfigError:
    """Turn pydantic's errors into one: the first in the order of the text, and a word on others.

    A key that is missing comes last: a misspelled one explains it.

    Args:
        error: What pydantic raised.
        cls: The model of the whole.
        data: What was validated.
        document: The text that it was read from.
    """
    models = {"": cls, **cls.inside}
    faults = []
    for detail in error.errors(include_url=False):
        if _is_of_its_entries(detail):
            continue
        path = _path(detail["loc"], data)
        problem, remedy = _explain(detail, path, models)
        unknown = detail["type"] == "extra_forbidden"
        if unknown and _OF_PEFT.fullmatch(str(path[-1])):
            remedy += (
                f"{'' if remedy.endswith('?') else '.'} lora_inject.from_peft reads a LoraConfig"
            )
        place, order = _place(cls, path, document, key=unknown)
        faults.append(((detail["type"] == "missing", *order), place, problem, remedy))
    (_, place, problem, remedy), *others = sorted(faults, key=lambda fault: fault[0])
    listed = [f"{place}: {problem}" for _, place, problem, _ in others]
    return ConfigError(place, problem, remedy + _also(listed, remedy))


def _is_of_its_entries(detail: ErrorDetails) -> bool:
    """Whether a list is short because of entries that are wrong, each of which has its error."""
    return detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]


def _place(
    cls: type[BaseModel], path: Loc, document: Document | None, *, key: bool
) -> tuple[str, tuple[int, int]]:
    """Return the place of a value, or of its key, in words, and where it stands in the text."""
    if document is not None:
        return document.place(path, key=key), document.order(path)
    outer = cls.__name__.replace("Config", "config")
    return f"{outer} ({dotted(path)})" if path else outer, (0, 0)


def _also(listed: list[str], remedy: str) -> str:
    """Return what follows a remedy: further faults."""
    if not listed:
        return ""
    end = "" if remedy.endswith((".", "?", "!")) else "."
    more = f"; and {len(listed) - _ALSO} more" if len(listed) > _ALSO else ""
    return f"{end} Also: {'; '.join(listed[:_ALSO])}{more}"


def _path(loc: Loc, data: Any) -> Loc:
    """Return the steps of a location that are in the data; pydantic adds tags of unions."""
    path: Loc = ()
    for step in loc:
        inside = step in data if isinstance(data, Mapping) else isinstance(step, int)
        if inside and isinstance(data, (Mapping, list, tuple)):
            data, path = data[step], (*path, step)  # type: ignore[index]
    return path


def _explain(
    detail: ErrorDetails, path: Loc, models: Mapping[str, type[BaseModel]]
) -> tuple[str, str]:
    """Return what was found, and what to do.

    | pydantic's kind of fault | said by |
    |---|---|
    | `value_error` | the validator, which raises both |
    | `extra_forbidden`, `missing`, `too_short` | the key |
    | `literal_error`, lists, numbers | the value and what it may have meant |
    | bounds and types | `_to_write`, in words of a YAML file |
    """
    kind, value, key = detail["type"], detail["input"], str(path[-1] if path else "")
    if kind == "value_error":
        problem, remedy = detail["ctx"]["error"].args
        return problem, remedy
    if kind == "extra_forbidden":
        return f"unknown key {show(key)}", _other_key(path, models)
    if kind == "missing":
        return f"'{detail['loc'][-1]}' is missing", f"Add {detail['loc'][-1]}: with its value"
    if kind == "too_short":
        return "it is empty", "Give one entry at least"
    if kind == "model_type" and key in models:
        keys = f" of {', '.join(_keys(models[key]))}" if key else ""
        return f"{show(value)} is not accepted", f"Write a mapping{keys}"
    return _of_value(detail, value, key, path)


def _of_value(detail: ErrorDetails, value: Any, key: str, path: Loc) -> tuple[str, str]:
    """Return what is wrong with a value, and what to write."""
    kind, number = detail["type"], _number_in(value)
    if kind == "greater_than_equal" and path[:1] == ("tokens",):
        return f"there is no row {show(value)}", "Rows are counted from 0"
    if kind in ("int_type", "float_type") and number:
        return f"{show(value)} is a word", f"Write {number}, without quotes and leading zeros"
    return f"{show(value)} is not accepted", _to_write(detail, value, key)


def _to_write(detail: ErrorDetails, value: Any, key: str) -> str:
    """Return what to write in place of a value, in the words of a YAML file."""
    kind = detail["type"]
    if kind == "literal_error":
        return _choice(detail, value, key)
    if kind in ("list_type", "tuple_type"):
        return _list_of(value)
    if kind in ("model_type", "dict_type"):
        return f"Write a mapping, such as {{name: {show(value)}}}"
    if bound := _BOUNDS.get(kind):
        words, name = bound
        return f"Write {words} {detail['ctx'][name]:.12g}"
    return _MEANT.get(kind, detail["msg"])


_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
"""pydantic's kind of fault to how bounds are said, and the bound's name there."""

_MEANT = {
    "int_type": "Write a whole number",
    "int_from_float": "Write a whole number",
    "float_type": "Write a number",
    "finite_number": "Write a finite number",
    "string_type": "Write a text",
    "bool_type": "Write true or false",
    "string_pattern_mismatch": "Write a name of letters, digits and _ that begins with a letter",
    "invalid_key": "Write keys that are texts",
}


def _list_of(value: Any) -> str:
    """Return how a value is written where a list is due."""
    if isinstance(value, Mapping):
        return "Write a list: each entry is a line that begins with '- '"
    return f"Write a list: [{value}]" if isinstance(value, str | int | float) else "Write a list"


def _choice(detail: ErrorDetails, value: Any, key: str) -> str:
    """Return which of some words may be meant."""
    expected = str(detail["ctx"]["expected"])
    meant = _suggestion(value, re.findall(r"'(\w+)'", expected)) or f"Write {expected}"
    if key in _MAPPINGS and not meant.endswith("?"):
        meant += f", or {_MAPPINGS[key]}"
    return meant


def _number_in(value: Any) -> str:
    """Return the number that a word with quotes or leading zeros was meant as, or ""."""
    text = value if isinstance(value, str) else ""
    match = re.fullmatch(r"([-+]?)0*([0-9]+(\.[0-9]+)?)", text, re.ASCII)
    return match[1] + match[2] if match else ""


def _other_key(path: Loc, models: Mapping[str, type[BaseModel]]) -> str:
    """Return what to write instead of an unknown key."""
    key = str(path[-1])
    owner = next((step for step in reversed(path[:-1]) if step in models), "")
    keys = _keys(models[str(owner)])
    meant = _ELSEWHERE.get(key, key)
    for step, model in models.items():
        if meant in _keys(model) and meant not in keys:
            return f"'{meant}' belongs {f'under {step}' if step else 'at the top level'}"
    return _suggestion(key, keys) or f"The keys are {', '.join(keys)}"


def _suggestion(word: Any, choices: list[str]) -> str:
    """Return a question with the choice that the word means elsewhere, or nearly spells."""
    if not isinstance(word, str):
        return ""
    near = [_ELSEWHERE[word]] if _ELSEWHERE.get(word) in choices else nearest(word, choices, n=1)
    return f"Did you mean '{near[0]}'?" if near else ""


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]
