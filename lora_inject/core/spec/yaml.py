"""A YAML document as plain data, with the place of every value.

YAML is parsed as untrusted input: composed into nodes and never built into objects. Duplicate keys,
tags, and aliases that expand without bound are errors. Words and numbers are those of YAML 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import yaml

from lora_inject.core.spec.words import Loc, dotted, printable, system_words
from lora_inject.errors import ConfigError, check_type, user_path

MAX_TEXT_BYTES = 1 << 20
MAX_NODES = 50_000  # of the document with its aliases written out
_TAG = "tag:yaml.org,2002:"
_QUOTES = "Write patterns in single quotes: there a backslash is only a backslash"
_DIGITS = "(0|[1-9](_?[0-9]){0,17})"
_EXPONENT = "[eE][-+]?[0-9]{1,4}"
_FINITE = rf"[-+]?(({_DIGITS})?\.[0-9]+|{_DIGITS}\.)({_EXPONENT})?|[-+]?{_DIGITS}{_EXPONENT}"
# PyYAML reads YAML 1.1, where `no` is false, 010 is 8, 1:30 is 90 and 1e-3 is a word.
_PLAIN: dict[str, tuple[str, Callable[[str], Any] | None]] = {
    "int": (rf"[-+]?{_DIGITS}", int),
    "float": (
        rf"{_FINITE}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(re.sub(r"\.(?=[in])", "", text.lower())),
    ),
    "bool": ("true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "null": ("~|null|Null|NULL|", None),
    "merge": ("<<", None),
}
"""Kind of a plain scalar, to what it looks like and how it is read."""


class _Loader(yaml.SafeLoader):
    """Composes nodes, with the words and numbers of YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would read as something else; never writes aliases."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  (PyYAML's signature)
        """Write every value out."""
        return True

    def text(self, data: str) -> yaml.ScalarNode:
        """Write a string so that it is read back as one."""
        # YAML folds line breaks, and U+0085 is one, in any style but double quotes.
        style = None if data.splitlines() == [data] else '"'
        return self.represent_scalar(f"{_TAG}str", data, style=style)


_Loader.yaml_implicit_resolvers = {}  # those of YAML 1.1
_Dumper.add_representer(str, _Dumper.text)
for _reader in (_Loader, _Dumper):
    for _kind, (_pattern, _) in _PLAIN.items():
        _reader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(rf"({_pattern})\Z"), None)


def written(data: Mapping[str, Any]) -> str:
    """Return plain data as YAML, in its order."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 16)
    return text


def read_text(
    path: str | PathLike[str], asked: str = "", remedy: str = "Give the path of a YAML file"
) -> str:
    """Return the text of a UTF-8 file, at most a byte more than a config may have."""
    asked = asked or printable(str(path))
    try:
        with user_path("read a config", path, ConfigError, remedy).open("rb") as file:
            return file.read(MAX_TEXT_BYTES + 1).decode("utf-8")
    except UnicodeDecodeError as error:
        problem, remedy = f"byte {error.start} is not UTF-8", "Save it as UTF-8 text"
    except OSError as error:
        problem = system_words(error)
    raise ConfigError(asked, problem, remedy)


class Document:
    """YAML text as plain data, with the place of each value.

    `source` is its name in messages. What a config may not contain is a `ConfigError`.
    """

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        self._nodes: dict[Loc, yaml.Node] = {}
        self._keys: dict[Loc, yaml.Node] = {}
        self._n_nodes = 0
        root = self._compose(text)
        if root is None:
            raise ConfigError(source, "the config is empty", "Add targets: with patterns")
        if not isinstance(root, yaml.MappingNode):
            remedy = "Write keys and values, such as targets: [q_proj]"
            raise self._fault(root, (), "the config is not a mapping", remedy)
        self.data: dict[str, Any] = self._build(root, (), ())

    def place(self, path: Loc, *, key: bool = False) -> str:
        """Return `FILE:LINE:COLUMN (key)` of a value, or of its key."""
        return self._at(self._keys[path] if key else self._node(path), path)

    def order(self, path: Loc) -> tuple[int, int]:
        """Return the line and column of a value, to sort by."""
        mark = self._node(path).start_mark
        return mark.line, mark.column

    def _compose(self, text: str) -> yaml.Node | None:
        check_type(self.source, text, str, "Give YAML text", ConfigError)
        if len(text) > MAX_TEXT_BYTES:
            problem = f"more than {MAX_TEXT_BYTES:,} characters"
            raise ConfigError(self.source, problem, "Give a config, not a checkpoint")
        try:
            return _Loader(text).get_single_node()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{self.source}{_line(mark)}" if mark else self.source
            problem = f"this is not valid YAML: {error.problem}"
            raise ConfigError(place, problem, _yaml_help(str(error.problem))) from None
        except yaml.reader.ReaderError as error:
            place = f"{self.source}, character {error.position}"
            problem = f"YAML does not allow the character U+{error.character:04X}"
            raise ConfigError(place, problem, "Remove it") from None
        except RecursionError:
            problem = "it is nested deeper than YAML is read"
            raise ConfigError(self.source, problem, "Give a config") from None
        except (ValueError, OverflowError) as error:  # an escape such as \UFFFFFFFF
            problem = f"this is not valid YAML: {error}"
            raise ConfigError(self.source, problem, _QUOTES) from None

    def _build(self, node: yaml.Node, path: Loc, above: tuple[yaml.Node, ...]) -> Any:
        self._n_nodes += 1
        if self._n_nodes > MAX_NODES:
            problem = f"more than {MAX_NODES:,} values once its aliases are written out"
            raise self._fault(node, path, problem, "Use fewer aliases")
        if any(node is other for other in above):
            raise self._fault(node, path, "an alias contains itself", "Write the value out")
        self._nodes.setdefault(path, node)
        kind, inside = node.tag.removeprefix(_TAG), (*above, node)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path, above)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self._build(n, (*path, i), inside) for i, n in enumerate(node.value)]
        return self._scalar(node, kind, path)

    def _mapping(self, node: yaml.MappingNode, path: Loc, above: tuple[yaml.Node, ...]) -> Any:
        inside = (*above, node)
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":  # `<<: *anchor`; what stands here goes before it
                merged = {**self._merged(value_node, path, inside), **merged}
                continue
            if key_node.tag != f"{_TAG}str":
                text = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a collection"
                problem = f"{text} is not a key: keys are strings"
                raise self._fault(key_node, path, problem, "Write it in quotes, if it is meant")
            key = key_node.value
            here = (*path, key)
            if key in own:
                line = self._keys[here].start_mark.line + 1
                problem = f"the key '{key}' is given twice, first in line {line}"
                raise self._fault(key_node, here, problem, "Remove one of them")
            self._keys[here] = key_node
            own[key] = self._build(value_node, here, inside)
        return {**merged, **own}

    def _merged(self, node: yaml.Node, path: Loc, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for part in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(part, yaml.MappingNode):
                raise self._fault(part, path, "'<<' takes a mapping", "Write <<: *anchor")
            data = {**self._build(part, path, above), **data}
        return data

    def _scalar(self, node: yaml.Node, kind: str, path: Loc) -> Any:
        if kind == "null":
            raise self._fault(node, path, "there is no value", "Write one, or remove the key")
        read = str if kind == "str" else _PLAIN.get(kind, ("", None))[1]
        if isinstance(node, yaml.ScalarNode) and read is not None:
            try:
                return read(node.value)
            except ValueError:
                problem = f"{node.value} is not {kind}"
                raise self._fault(node, path, problem, "Remove the tag") from None
        problem = f"the tag {node.tag.replace(_TAG, '!!')} is not allowed"
        remedy = "A config has strings, numbers, lists and mappings only; remove the tag"
        raise self._fault(node, path, problem, remedy)

    def _fault(self, node: yaml.Node, path: Loc, problem: str, remedy: str) -> ConfigError:
        return ConfigError(self._at(node, path), problem, remedy)

    def _at(self, node: yaml.Node, path: Loc) -> str:
        return f"{self.source}{_line(node.start_mark)}{f' ({dotted(path)})' if path else ''}"

    def _node(self, path: Loc) -> yaml.Node:
        """Return the node at `path`, or the innermost one around it."""
        while path not in self._nodes:
            path = path[:-1]
        return self._nodes[path]


def _line(mark: yaml.Mark) -> str:
    return f":{mark.line + 1}:{mark.column + 1}"


def _yaml_help(problem: str) -> str:
    if "unknown escape" in problem:
        return _QUOTES
    if "\\t" in problem:
        return "Indent with spaces, not tabs"
    if "alias" in problem:
        return "Define the anchor before it is used; a pattern that begins with * needs quotes"
    return "Check indentation, brackets and quotes there"
