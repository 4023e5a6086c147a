"""Strict models of pydantic, from YAML or plain data, with errors in words at their place.

What PyYAML and pydantic find is said at its line and column. Added are the nearest key or value,
where else a key belongs, and our name for a key of other programs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any, ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from lora_inject.core.spec.names import meant, printable, show
from lora_inject.errors import ConfigError, check_type, user_path

Loc = tuple[str | int, ...]
"""The keys and indices from a model to a value inside."""


class Strict(BaseModel):
    """Unknown keys and wrong types are errors; an integer is accepted for a float."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        populate_by_name=True,
    )
    # models inside, by their key, where an unknown key may belong
    inside: ClassVar[Mapping[str, type[BaseModel]]] = {}

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise in_words(error, type(self), data) from None

    # As in pydantic's own BaseModel: a model inside a model is validated by the outer one.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


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
        source = source or f"<{cls.__name__.lower()}>"
        check_type(source, text, str, "Give YAML text", ConfigError)
        try:
            loader = _Loader(text)
            root = loader.get_single_node()
            _check_aliases(root, source)
            data = loader.construct_document(root) if root else None
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
            problem = getattr(error, "problem", None) or str(error)
            remedy = "Check indentation, brackets and tags there; patterns want single quotes"
            place = f"{source}{_place(getattr(error, 'problem_mark', None))}"
            raise ConfigError(place, f"this is not valid YAML: {problem}", remedy) from None
        if not isinstance(data, dict):
            found = "it is empty" if root is None else "it is not a mapping"
            raise ConfigError(source, found, "Write keys and values, such as targets: [q_proj]")
        return cls._validated(data, source, root)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make it from plain data with the keys of the schema.

        Raises:
            ConfigError: It is not valid; the message names the key.
        """
        return cls._validated(dict(data) if isinstance(data, Mapping) else data)

    @classmethod
    def _validated(cls, data: object, source: str = "", root: yaml.Node | None = None) -> Self:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise in_words(error, cls, data, source, root) from None

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
        if isinstance(value, str) and re.search(r"\n|^ *\{.*: .*\} *$", value):
            remedy = f"Use {name}.from_text for text; a str is the path of a file"
            raise ConfigError(name.lower(), "YAML text where a path is meant", remedy)
        return cls.from_yaml(value)


def read_text(
    path: str | PathLike[str], asked: str = "", remedy: str = "Give the path of a YAML file"
) -> str:
    """Return the text of a UTF-8 file."""
    asked = asked or printable(str(path))
    try:
        return user_path("read a config", path, ConfigError, remedy).read_text("utf-8")
    except UnicodeDecodeError as error:
        problem, remedy = f"byte {error.start} is not UTF-8", "Save it as UTF-8 text"
    except OSError as error:
        problem = error.strerror or str(error)
    raise ConfigError(asked, problem, remedy)


# ------------------------------------------------------------------------------------ YAML itself

_TAG = "tag:yaml.org,2002:"
MOST_ALIASED = 10_000
"""Values for which the aliases of a file may stand, all together."""
_DIGITS = "(0|[1-9](_?[0-9])*)"
_EXPONENT = "[eE][-+]?[0-9]{1,4}"
# PyYAML reads YAML 1.1, where `no` is false, 010 is 8, 1:30 is 90 and 1e-3 is a word.
_PLAIN = {
    "int": rf"[-+]?{_DIGITS}",
    "float": rf"[-+]?(({_DIGITS})?\.[0-9]+|{_DIGITS}\.)({_EXPONENT})?|[-+]?{_DIGITS}{_EXPONENT}"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "bool": "true|True|TRUE|false|False|FALSE",
    "null": "~|null|Null|NULL|",
    "merge": "<<",
}


class _Loader(yaml.SafeLoader):
    """Reads words and numbers of YAML 1.2; refuses tags, a key twice, keys without a value."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Raise for a tag: what PyYAML makes of `!!int` or `!!bool x` is an error of Python."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        tag = getattr(event, "tag", None)
        is_text = isinstance(event, yaml.ScalarEvent) and tag == f"{_TAG}str"
        if tag is not None and not is_text:
            problem = f"the tag {tag.replace(_TAG, '!!')} is not allowed"
            raise yaml.constructor.ConstructorError(None, None, problem, event.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: ARG002
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if key.tag == f"{_TAG}str"):
            if key.value in lines:
                problem = f"the key '{key.value}' is given twice, first in line {lines[key.value]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep=True)

    def refuse_null(self, node: yaml.Node) -> None:
        """Raise for a key without a value."""
        problem = "there is no value; write one, or remove the key"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would read as something else; never writes aliases."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002  (PyYAML's signature)
        """Write every value out."""
        return True

    def text(self, data: str) -> yaml.ScalarNode:
        """Write a string so that it is read back as one."""
        # YAML folds line breaks, and U+0085 is one, in any style but double quotes.
        style = None if data.splitlines() == [data] else '"'
        return self.represent_scalar(f"{_TAG}str", data, style=style)


_Loader.yaml_implicit_resolvers = {}  # those of YAML 1.1
_Loader.add_constructor(f"{_TAG}null", _Loader.refuse_null)
_Dumper.add_representer(str, _Dumper.text)
for _reader in (_Loader, _Dumper):
    for _kind, _pattern in _PLAIN.items():
        _reader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(rf"({_pattern})\Z"), None)


def _check_aliases(root: yaml.Node | None, source: str) -> None:
    """Raise if aliases stand for more than MOST_ALIASED values: a few lines of them never end."""
    sizes: dict[int, int] = {}  # of each node, aliases unfolded
    n_aliased = 0

    def size(node: yaml.Node, path: Loc) -> int:
        nonlocal n_aliased
        n = sizes[id(node)] = 1  # of a node inside of itself, which PyYAML refuses
        for step, child in _children(node):
            here = (*path, step)
            if (aliased := sizes.get(id(child))) is not None:
                n_aliased += aliased
            if n_aliased > MOST_ALIASED:
                place = f"{source}{_place(node.start_mark)} ({_dotted(here)})"
                problem = f"here aliases stand for more than {MOST_ALIASED:,} values"
                raise ConfigError(place, problem, "Write out the few that are meant")
            n += size(child, here) if aliased is None else aliased
        sizes[id(node)] = n
        return n

    if root is not None:
        size(root, ())


def _children(node: yaml.Node) -> Iterator[tuple[str | int, yaml.Node]]:
    """Yield the values inside a node, by key or index; a key may be a node with values, too."""
    if isinstance(node, yaml.SequenceNode):
        yield from enumerate(node.value)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = str(key.value)[:60] if isinstance(key, yaml.ScalarNode) else "a key"
            yield from ((name, key), (name, value))


def written(data: Mapping[str, Any]) -> str:
    """Return plain data as YAML, in its order."""
    style: dict[str, Any] = {"default_flow_style": False, "width": 1 << 16}
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)
    return text


def _mark(node: yaml.Node | None, path: Loc, *, of_key: bool) -> yaml.Mark | None:
    """Return where the value at a path begins, or its key; else the innermost one around it."""
    mark = node.start_mark if node else None
    for step in path:
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            node = node.value[step]
        elif isinstance(node, yaml.MappingNode):
            # What a mapping takes over by `<<` stands before what it says itself.
            pairs = (pair for pair in reversed(node.value) if pair[0].value == str(step))
            key, node = next(pairs, (None, None))
            if of_key and key is not None:
                mark = key.start_mark
                continue
        if node is None:
            break
        mark = node.start_mark
    return mark


def _place(mark: yaml.Mark | None) -> str:
    return f":{mark.line + 1}:{mark.column + 1}" if mark else ""


# ------------------------------------------------------------------------------- errors in words

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
    "lr": ("learning_rate",),
}
_OF_PEFT = re.compile("r|(lora|target|use|init_lora|exclude|modules_to|layers_to)_.+|peft_type")
_ELSEWHERE = {other: ours for ours, others in _NAMES.items() for other in others}
"""Names of the same thing elsewhere, PEFT above all, to ours."""
_LEFT_OUT = {
    "lora_bias": "A bias of B does not train here; train the layers' own: bias: adapted",
}
"""Keys that have no other name, and what to do instead."""


def in_words(
    error: ValidationError,
    cls: type[Strict],
    data: object,
    source: str = "",
    root: yaml.Node | None = None,
) -> ConfigError:
    """Turn pydantic's errors into one: the first in the order of the text, and a word on others.

    A key that is missing comes last: a misspelled one explains it.

    Args:
        error: What pydantic raised.
        cls: The model of the whole.
        data: What was validated.
        source: The name of the text that it was read from.
        root: The text, with the place of each value.
    """
    faults = []
    details: dict[Loc, ErrorDetails] = {}
    for detail in error.errors(include_url=False):
        details.setdefault(_path(detail["loc"], data), detail)
    # Of the branches of a union the one that got deepest explains; so do entries that are wrong.
    around = {path[:n] for path in details for n in range(len(path))}
    for path, detail in details.items():
        kind = detail["type"]
        if path in around:
            continue
        mark = _mark(root, path, of_key=kind == "extra_forbidden")
        place = f"{source}{_place(mark)}" or cls.__name__.replace("Config", "config")
        place += f" ({_dotted(path)})" if path else ""
        order = (kind == "missing", mark.index if mark else 0)
        faults.append((order, place, *_explained(detail, path, cls)))
    (_, place, problem, remedy), *others = sorted(faults, key=lambda fault: fault[0])
    if others:
        listed = "; ".join(f"{place}: {problem}" for _, place, problem, _ in others[:_ALSO])
        more = f"; and {len(others) - _ALSO} more" if len(others) > _ALSO else ""
        end = "" if remedy.endswith((".", "?", "!")) else "."
        remedy = f"{remedy}{end} Also: {listed}{more}"
    return ConfigError(place, problem, remedy)


def _path(loc: Loc, data: object) -> Loc:
    """Return the steps of a location that are in the data; pydantic adds tags of unions."""
    path: Loc = ()
    for step in loc:
        inside = step in data if isinstance(data, Mapping) else isinstance(step, int)
        if inside and isinstance(data, (Mapping, list, tuple)):
            data, path = data[step], (*path, step)  # type: ignore[index]
    return path


def _dotted(path: Loc) -> str:
    """Return `("targets", 1, "rank")` as `targets[1].rank`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def _explained(detail: ErrorDetails, path: Loc, cls: type[Strict]) -> tuple[str, str]:
    """Return what was found, and what to do."""
    kind, value = detail["type"], detail["input"]
    if kind == "value_error":  # our validators raise both
        problem, remedy = detail["ctx"]["error"].args
        return problem, remedy
    if kind == "extra_forbidden":
        if path[-1] in _LEFT_OUT:
            return f"'{path[-1]}' is set", _LEFT_OUT[str(path[-1])]
        remedy = _other_key(path, {"": cls, **cls.inside})
        if _OF_PEFT.fullmatch(str(path[-1])):
            remedy += f"{'' if remedy[-1] == '?' else '.'} lora_inject.from_peft reads a LoraConfig"
        return f"unknown key {show(path[-1])}", remedy
    if kind == "missing":
        return f"'{detail['loc'][-1]}' is missing", f"Add {detail['loc'][-1]}: with its value"
    remedy = detail["msg"]
    if kind == "literal_error" and isinstance(value, str):
        choices = re.findall(r"'(\w+)'", str(detail["ctx"]["expected"]))
        remedy = meant(value, choices) if choices else remedy
    return f"{show(value)} is not accepted", remedy


def _other_key(path: Loc, models: Mapping[str, type[BaseModel]]) -> str:
    """Return what to write instead of an unknown key."""
    key = str(path[-1])
    owner = next((step for step in reversed(path[:-1]) if step in models), "")
    keys = _keys(models[str(owner)])
    ours = _ELSEWHERE.get(key, key)
    if ours in keys:
        return f"Did you mean '{ours}'?"
    for step, model in models.items():
        if ours in _keys(model):
            return f"'{ours}' belongs {f'under {step}' if step else 'at the top level'}"
    return meant(key, keys)


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]
