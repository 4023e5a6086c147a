"""Strict models of pydantic: no unknown keys, no conversions, and errors in words."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Signature, signature
from os import PathLike
from typing import Any, ClassVar, Self, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError

from lora_inject.core.spec.explained import config_error
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
            raise _in_words(error, type(self), data) from None

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
            raise _in_words(error, cls, data, document) from None

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


def _in_words(
    error: ValidationError, cls: type[Strict], data: Any, document: Document | None = None
) -> ConfigError:
    """Return what pydantic found wrong, in words."""
    return config_error(error, cls, cls.inside, data, document)
