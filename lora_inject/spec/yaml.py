"""A YAML document as plain data, with the place of everything in it.

YAML is composed into nodes and never built into objects, so that whatever turns out to be
wrong with a value later can be reported at its line and column, in the file's own words. Duplicate
keys, tags that build objects and aliases that explode are errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, cast

import yaml

from lora_inject.errors import ConfigError

Loc = tuple[str | int, ...]

MAX_TEXT_BYTES = 1 << 20
MAX_NODES = 50_000  # of the document with its aliases written out
MAX_DEPTH = 16
_TAG = "tag:yaml.org,2002:"
# YAML 1.1, which PyYAML speaks, reads 1e-3 and 1.0e3 as strings; YAML 1.2 and people read numbers.
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+")
_PLAIN_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,17})")
_PLAIN_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")


class _Loader(yaml.SafeLoader):
    """Composes nodes, never builds objects; refuses nesting that no config has."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(None, None, f"nested more than {MAX_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as something else; never writes aliases."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  (PyYAML's signature)
        """Write every value out."""
        return True

    def text(self, data: str) -> yaml.ScalarNode:
        """Write a string so that it is read back as one."""
        # YAML folds line breaks, and U+0085 is one, in any style but double quotes.
        style = None if data.splitlines() == [data] else '"'
        return self.represent_scalar(f"{_TAG}str", data, style=style)


Dumper.add_representer(str, Dumper.text)
for _reader in (_Loader, Dumper):
    _reader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))


@dataclass
class Document:
    """YAML text as plain data that remembers where each of its values stands.

    Attributes:
        text: The YAML.
        source: What messages call it.
        data: Strings, numbers, booleans, lists and dicts.
    """

    text: str
    source: str
    data: dict[str, Any] = field(init=False)
    nodes: dict[Loc, yaml.Node] = field(init=False, default_factory=dict)
    keys: dict[Loc, yaml.Node] = field(init=False, default_factory=dict)
    n_nodes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        root = self._compose()
        if root is None:
            raise self._error(None, (), "the config is empty", "Add targets: with patterns")
        self.nodes[()] = root
        if not isinstance(root, yaml.MappingNode):
            remedy = "Write keys and values, such as targets: [q_proj]"
            raise self._error(root, (), "the config is no mapping", remedy)
        self.data = self._mapping(root, (), ())

    def _compose(self) -> yaml.Node | None:
        if len(self.text) > MAX_TEXT_BYTES:
            found = f"{len(self.text):,} characters, more than a config can have"
            raise ConfigError(self.source, found, "Shorten it")
        try:
            return _Loader(self.text).get_single_node()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = self.source if mark is None else f"{self.source}{_line(mark)}"
            found = f"this is no valid YAML: {error.problem}"
            raise ConfigError(place, found, _yaml_help(str(error.problem))) from None
        except (
            ValueError,
            OverflowError,
        ) as error:  # an escape of no character, such as \UFFFFFFFF
            remedy = "Write patterns in single quotes: there a backslash is only a backslash"
            raise ConfigError(self.source, f"this is no valid YAML: {error}", remedy) from None
        except yaml.reader.ReaderError as error:
            found = (
                f"the character U+{error.character:04X} at {error.position} is not allowed in YAML"
            )
            raise ConfigError(self.source, found, "Remove it") from None

    def _build(self, node: yaml.Node, path: Loc, above: tuple[yaml.Node, ...]) -> Any:
        self.n_nodes += 1
        if self.n_nodes > MAX_NODES:
            found = f"more than {MAX_NODES:,} values once its aliases are written out"
            raise self._error(node, path, found, "Use fewer aliases")
        if any(node is other for other in above):
            raise self._error(node, path, "an alias contains itself", "Write the value out")
        self.nodes.setdefault(path, node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [
                self._build(child, (*path, i), (*above, node)) for i, child in enumerate(node.value)
            ]
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, path, above)
        raise self._tag_error(node, path)

    def _mapping(
        self, node: yaml.MappingNode, path: Loc, above: tuple[yaml.Node, ...]
    ) -> dict[str, Any]:
        pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                merged.append(value_node)
                continue
            key = self._key(key_node, path)
            if key in pairs:
                line = pairs[key][0].start_mark.line + 1
                found = f"the key '{key}' is given twice, first in line {line}"
                raise self._error(key_node, (*path, key), found, "Remove one of them")
            pairs[key] = key_node, value_node
        data = {}
        for key, (key_node, value_node) in pairs.items():
            self.keys.setdefault((*path, key), key_node)
            data[key] = self._build(value_node, (*path, key), (*above, node))
        for value_node in merged:  # `<<: *anchor`; what stands here itself goes before it
            data = {**self._merge(value_node, path, (*above, node)), **data}
        return data

    def _merge(self, node: yaml.Node, path: Loc, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        many = isinstance(node, yaml.SequenceNode)
        data: dict[str, Any] = {}
        for part in node.value if many else [node]:
            if not isinstance(part, yaml.MappingNode):
                raise self._error(part, path, "'<<' takes a mapping", "Write <<: *anchor")
            data = {**self._build(part, path, above), **data}
        return data

    def _key(self, node: yaml.Node, path: Loc) -> str:
        if isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}str":
            return cast("str", node.value)
        text = node.value if isinstance(node, yaml.ScalarNode) else "a collection"
        found = f"{text} is no key: keys are strings"
        raise self._error(node, path, found, "Write it in quotes, if it is meant")

    def _scalar(self, node: yaml.ScalarNode, path: Loc) -> Any:
        text, kind = cast("str", node.value), node.tag.removeprefix(_TAG)
        if kind == "str":
            return text
        if kind == "bool":
            return text.lower() in {"yes", "true", "on"}
        if kind == "null":
            raise self._error(node, path, "there is no value", "Write one, or remove the key")
        if kind == "int":
            if _PLAIN_INT.fullmatch(text):
                return int(text)
            remedy = "Write it as a plain decimal number, or in quotes if a string is meant"
            raise self._error(node, path, f"{text} is a number that YAML reads its own way", remedy)
        if kind == "float":
            if text.lower().strip("-+") in {".inf", ".nan"}:
                return float(text.replace(".", ""))
            if _PLAIN_FLOAT.fullmatch(text):
                return float(text)
            remedy = "Write it as a plain decimal number, or in quotes if a string is meant"
            raise self._error(node, path, f"{text} is a number that YAML reads its own way", remedy)
        raise self._tag_error(node, path)

    def _tag_error(self, node: yaml.Node, path: Loc) -> ConfigError:
        if node.tag == f"{_TAG}timestamp":
            return self._error(
                node, path, f"YAML reads {node.value} as a date", "Write it in quotes"
            )
        tag = node.tag.replace(_TAG, "!!")
        remedy = "A config has strings, numbers, lists and mappings only; remove the tag"
        return self._error(node, path, f"the tag {tag} is not allowed", remedy)

    def _error(self, node: yaml.Node | None, path: Loc, found: str, remedy: str) -> ConfigError:
        mark = "" if node is None else _line(node.start_mark)
        key = f" ({dotted(path)})" if path else ""
        return ConfigError(f"{self.source}{mark}{key}", found, remedy)

    def _node(self, path: Loc) -> yaml.Node:
        """The node at `path`, or the innermost one around it."""
        for n in range(len(path), 0, -1):
            if path[:n] in self.nodes:
                return self.nodes[path[:n]]
        return self.nodes[()]

    def place(self, path: Loc, *, key: bool = False) -> str:
        """`FILE:LINE:COLUMN (key)` of a value, or of its key."""
        node = self.keys[path] if key and path in self.keys else self._node(path)
        name = f" ({dotted(path)})" if path else ""
        return f"{self.source}{_line(node.start_mark)}{name}"

    def order(self, path: Loc) -> tuple[int, int]:
        """Where a value stands, to sort by."""
        mark = self._node(path).start_mark
        return mark.line, mark.column

    def hint(self, path: Loc) -> str | None:
        """What to do where YAML's own reading of a plain word is the likely mistake."""
        node = self._node(path)
        if isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}bool" and not node.style:
            return f"YAML reads {node.value} as true or false; in quotes it is a word"
        return None


def _line(mark: yaml.Mark) -> str:
    return f":{mark.line + 1}:{mark.column + 1}"


def _yaml_help(problem: str) -> str:
    if "unknown escape" in problem:
        return "Write patterns in single quotes: there a backslash is only a backslash"
    if "\\t" in problem:
        return "Indent with spaces, not tabs"
    if "alias" in problem:
        return "Define the anchor before it is used; a pattern that begins with * needs quotes"
    return "Check indentation, brackets and quotes there"


def show(value: Any) -> str:
    """The value as the user would recognise it, short."""
    text = f"'{value}'" if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def dotted(path: Loc) -> str:
    """`("targets", 1, "rank")` as `targets[1].rank`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")
