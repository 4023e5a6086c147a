"""Pages of the documentation that are read off the package: the config, the commands, the errors.

mkdocs calls `on_page_markdown` for each page. A line `<!-- generated: NAME -->` is replaced by what
the function of that name returns, so that these tables cannot disagree with the code.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import typer.main

from lora_inject import errors
from lora_inject.cli import app
from lora_inject.spec.config import Config

MARK = re.compile(r"<!-- generated: (\w+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill a page's marks."""
    return MARK.sub(lambda mark: TABLES[mark[1]](), markdown)


def config_keys() -> str:
    """Every key of the config with its type, default and meaning, from the JSON Schema."""
    schema = Config.json_schema()
    parts = [_keys("The file", schema)]
    for name, part in schema.get("$defs", {}).items():
        if "properties" in part:
            parts.append(_keys(name, part))
    return "\n".join(parts)


def _keys(title: str, schema: dict[str, Any]) -> str:
    rows = [f"## {title}\n", schema.get("description", ""), ""]
    rows += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, value in schema["properties"].items():
        default = f"`{value['default']}`" if "default" in value else ""
        meaning = str(value.get("description", "")).replace("\n", " ").replace("|", "\\|")
        rows.append(f"| `{key}` | {_type(value)} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def _type(value: dict[str, Any]) -> str:
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_type(option) for option in value["anyOf"]))
    if "enum" in value:
        return ", ".join(f"`{option}`" for option in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if "$ref" in value:
        name = str(value["$ref"]).rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if value.get("type") == "array":
        return f"list of {_type(value.get('items', {}))}"
    return str(value.get("type", "any"))


def commands() -> str:
    """Every command with its arguments, options and help."""
    group: Any = typer.main.get_command(app)
    parts = []
    for name in group.list_commands(None):
        command = group.commands[name]
        parts.append(f"## lora-inject {name}\n\n{_prose(command.help or '')}\n")
        parts.append("| argument or option | default | meaning |\n|---|---|---|")
        for parameter in command.params:
            names = ", ".join(f"`{n}`" for n in (*parameter.opts, *parameter.secondary_opts))
            if parameter.param_type_name == "argument":
                names = f"`{(parameter.metavar or parameter.name or '').strip('{}')}`"
            plain = parameter.default not in (None, (), []) and not callable(parameter.default)
            default = f"`{parameter.default}`" if plain else ""
            meaning = (getattr(parameter, "help", "") or "").replace("|", "\\|").replace("\n", " ")
            parts.append(f"| {names} | {default} | {meaning} |")
        parts.append("")
    return "\n".join(parts)


def _prose(text: str) -> str:
    return re.sub(r"^\s*[\b\f]\s*$", "", text, flags=re.MULTILINE).strip()


def error_classes() -> str:
    """Every class of error with what it means."""
    rows = ["| error | stands for |", "|---|---|"]
    for name, cls in inspect.getmembers(errors, inspect.isclass):
        if issubclass(cls, errors.LoraInjectError):
            first = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
            rows.append(f"| `{name}` | {first} |")
    return "\n".join(rows)


TABLES: dict[str, Callable[[], str]] = {
    "config_keys": config_keys,
    "commands": commands,
    "error_classes": error_classes,
}
