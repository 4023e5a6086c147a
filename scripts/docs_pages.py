"""Pages of the documentation that are read off the package: names, config, commands, errors.

mkdocs calls the functions `on_...` for each page. A line `<!-- generated: NAME ARGUMENTS -->` is
replaced by what the function of that name returns, so that pages cannot disagree with the code.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer.main
import yaml
from typer.cli import get_docs_for_click

from lora_inject import errors
from lora_inject.cli import app
from lora_inject.core.spec.config import Config
from lora_inject.version import __version__

MARK = re.compile(r"<!-- generated: (\w+) ?(.*?) -->")
NOTEBOOKS = Path(__file__).parent / "examples"
CONFIGS = Path(__file__).parents[1] / "lora_inject" / "configs"
MESSAGES = Path(__file__).parents[1] / "tests" / "house" / "messages.yaml"
STAGES = {
    "ConfigError": "Reading a config",
    "MatchError": "Matching names",
    "LayerError": "Adapting layers",
    "StateError": "Using a verb",
    "FormatError": "Adapter files",
    "CheckpointError": "Checkpoints on disk",
    "ServerError": "Servers",
}


def on_config(config: Any) -> Any:
    """Say at the foot of each page which version it describes, and link the repository.

    Where CI builds the site, it says whose repository it is; a checkout may be anybody's.
    """
    config.copyright = f"lora_inject {__version__}"
    if repository := os.environ.get("GITHUB_REPOSITORY"):
        server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
        config.repo_url = f"{server}/{repository}"
        config.repo_name = repository
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill a page's marks."""
    return MARK.sub(lambda mark: PARTS[mark[1]](*mark[2].split()), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Prepare tables for narrow screens."""
    return re.sub(r"<table>.*?</table>", _labeled, html, flags=re.DOTALL)


def _labeled(table: re.Match[str]) -> str:
    """Give each cell the head of its column: narrow screens show a table's rows as blocks."""
    if "text-align: right" in table[0]:  # numbers: columns stay columns
        return table[0]
    found = re.findall(r"<th(?: [^>]*)?>(.*?)</th>", table[0])
    heads = [re.sub("<.*?>", "", head) for head in found]

    def row(cells: re.Match[str]) -> str:
        labels = iter(heads)
        return re.sub(r"<td", lambda _: f'<td data-label="{next(labels)}"', cells[0])

    return re.sub(r"<tr>.*?</tr>", row, table[0], flags=re.DOTALL)


def names(module: str) -> str:
    """Every public name of a module, for mkdocstrings."""
    public = importlib.import_module(module).__all__
    return "\n".join(f"::: {module}.{name}" for name in public)


def config_keys() -> str:
    """Every key of the config with its type, default and meaning, from the JSON Schema."""
    schema = json.loads((CONFIGS / "schema.json").read_text(encoding="utf-8"))
    named = ("Rule", "Expect", "Axes", "Normal")
    parts = [_keys(name, schema["$defs"][name]) for name in named]
    return "\n".join([_keys("The file", schema), *parts])


def _keys(title: str, schema: dict[str, Any]) -> str:
    rows = [f"## {title}\n", "| key | type | default | meaning |", "|---|---|---|---|"]
    required = schema.get("required", ())
    for key, value in schema["properties"].items():
        default = f"`{_yaml(value['default'])}`" if "default" in value else "none"
        if key in required:
            default = "required"
        meaning = str(value.get("description", "")).replace("\n", " ").replace("|", "\\|")
        if title == "Rule" and key in Config.model_fields:
            default, meaning = "the file's", "As for the whole file, for this rule."
        rows.append(f"| `{key}` | {_type(value)} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def _yaml(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


def _type(value: dict[str, Any]) -> str:
    kind = value.get("type", "any")
    if options := value.get("anyOf") or value.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(option) for option in options))
    if isinstance(kind, list):
        return " or ".join(kind)
    if "enum" in value:
        return ", ".join(f"`{option}`" for option in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if "$ref" in value:
        name = str(value["$ref"]).rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if kind == "array":
        return f"list of {_type(value.get('items', {}))}"
    if kind == "object" and isinstance(inner := value.get("additionalProperties"), dict):
        return f"mapping to {_type(inner)}"
    return str(kind)


def commands() -> str:
    """Every command with its help, its arguments and its options, as typer writes them."""
    group: Any = typer.main.get_command(app)
    text = get_docs_for_click(obj=group, ctx=typer.Context(group, info_name="lora-inject"))
    text = text[text.index("\n## ") :]  # the page begins with what all commands share
    text = re.sub(r"^(\* `--help`|Exit codes:).*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^Example:\n  (.*)", r"**Example**: `\1`", text, flags=re.MULTILINE)


def error_messages() -> str:
    """Every class of error with its messages, by stage, from the table that a test holds."""
    said = yaml.safe_load(MESSAGES.read_text(encoding="utf-8"))
    parts = []
    for name, stage in STAGES.items():
        meaning = " ".join((getattr(errors, name).__doc__ or "").split())
        rows = [f"| {mistake} | {_code(message)} |" for mistake, message in said[name].items()]
        parts += [f"## {stage}\n", f"`{name}`: {meaning}\n"]
        parts += ["| mistake | message |", "|---|---|", *rows, ""]
    return "\n".join(parts)


def _code(message: str) -> str:
    ticks = "``" if "`" in message else "`"
    return f"{ticks}{message}{ticks}".replace("|", "\\|")


def notebook(name: str) -> str:
    """A notebook of the examples: its text, its code and what each cell printed and drew."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join(map(_printed, cell["outputs"]))
        if printed.strip():
            parts.append(f"```output\n{printed.rstrip()}\n```")
        parts += [_drawn(out["data"]) for out in cell["outputs"] if _drawn(out.get("data", {}))]
    return "\n\n".join(parts) + "\n"


def configs() -> str:
    """The configs of model families."""
    parts = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()[1:]  # the first is for editors
        body = next(i for i, line in enumerate(lines) if not line.startswith("#"))
        about = " ".join(line.removeprefix("# ") for line in lines[:body])
        text = "\n".join(lines[body:])
        parts += [f"### {path.stem}\n", about, f"```yaml\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def _printed(output: dict[str, Any]) -> str:
    """Return what an output of a cell says as text, unless a picture says it."""
    if output["output_type"] == "stream":
        return "".join(output["text"])
    data = output.get("data", {})
    return "" if _drawn(data) else "".join(data.get("text/plain", ())) + "\n"


def _drawn(data: dict[str, Any]) -> str:
    """Return a picture of a cell inside the page, or ""."""
    picture = "".join(data.get("image/png", ())).replace("\n", "")
    return f"![what the cell draws](data:image/png;base64,{picture})" if picture else ""


PARTS: dict[str, Callable[..., str]] = {
    "names": names,
    "config_keys": config_keys,
    "commands": commands,
    "error_messages": error_messages,
    "notebook": notebook,
    "configs": configs,
}
