"""Who may import whom: the core imports no room, rooms go by a table, and nothing in a circle."""

import ast
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lora_inject

PACKAGE = Path(lora_inject.__file__).parent

# The core's folders, from the top down: a file imports only from its own and those above it.
LADDER = ("spec", "files", "functional", "adapter", "layers", "model")

# Room -> the rooms that it may import besides the core.
ROOMS: dict[str, set[str]] = {
    "algebra": set(),
    "analysis": {"algebra", "checkpoint", "trials"},
    "checkpoint": {"algebra", "experts", "formats"},
    "checks": set(),
    "cli": {"algebra", "analysis", "checkpoint", "experts", "formats", "serving", "trials"},
    "compiled": {"rows"},
    "distributed": set(),
    "experts": set(),
    "formats": {"algebra", "rows"},
    "integrations": {"checks", "formats"},
    "quantized": {"experts"},
    "rows": {"experts"},
    "serving": {"formats"},
    "trials": {"experts", "formats", "rows"},
}
# Files beside the folders, for everybody.
LOOSE = {"version", "errors", "private", "private_names", "private_needed", "trees"}
ROOT = "the package's front"  # lora_inject/__init__.py, for users; no file inside imports it

# What costs seconds, or need not be installed, is imported where it is used.
NEVER_AT_IMPORT = {"transformers", "peft", "accelerate", "gguf", "loralib", "huggingface_hub"}
NEVER_AT_IMPORT |= {"matplotlib"}


def modules() -> dict[str, str]:
    """Dotted name below the package to source."""
    sources = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name or ROOT] = path.read_text(encoding="utf-8")
    return sources


def imports(name: str, source: str, known: Iterable[str]) -> set[str]:
    """Files of the package that a file imports, wherever in it the import stands."""
    found = set()
    for node in _nodes(source):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports hide who is meant"
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [t for t in below if _inside(t) in known] or [str(node.module)]
        else:
            continue
        found |= {inside for target in targets if (inside := _inside(target)) is not None}
    return found - {name}


@cache
def _nodes(source: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(source)))


def _inside(target: str) -> str | None:
    if target == "lora_inject":
        return ROOT
    return target.removeprefix("lora_inject.") if target.startswith("lora_inject.") else None


def allowed(name: str, other: str) -> bool:
    """Whether one file may import another, by their folders."""
    folder, _, rest = name.partition(".")
    other_folder, _, other_rest = other.partition(".")
    if other == ROOT or other == "__main__":
        return False
    if name in LOOSE or other in LOOSE:
        return other in LOOSE
    if name == "__main__":
        return other_folder == "cli"
    if folder == other_folder == "core":
        return step(rest) >= step(other_rest)
    if folder == "core":
        return False
    assert folder in ROOMS, f"'{name}' lies loose: put it into a folder"
    return other_folder in {folder, "core", *ROOMS[folder]}


def step(name: str) -> int:
    """Number of a core file's folder, from the top down."""
    folder = name.partition(".")[0]
    assert folder in LADDER, f"'core.{name}' lies loose: put it into a folder"
    return LADDER.index(folder)


def violations(sources: Mapping[str, str]) -> list[str]:
    """Every import that is not allowed, and the circle if there is one."""
    graph = {name: imports(name, text, sources) for name, text in sources.items() if name != ROOT}
    wrong = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in sorted(others)
        if not allowed(name, other)
    ]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        wrong.append(f"circle: {' <- '.join(circle.args[1])}")
    return wrong


def test_a_file_imports_only_what_it_may():
    assert violations(modules()) == []


def test_a_file_name_occurs_once():
    stems = Counter(name.rpartition(".")[2] for name in modules())
    assert [stem for stem, n in stems.items() if n > 1] == []


def test_the_core_reaches_a_room_by_one_table_only():
    """Imports by a string are not seen above, so the core has them in one file."""
    for name, source in modules().items():
        if name.startswith("core."):
            assert ("import_module" in source) == (name == "core.spec.rooms"), name


def test_the_architecture_lists_what_a_guard_is_asked() -> None:
    asks = re.compile(r'\b(before|after|functions)\("(\w+)"')
    names = {
        name if how == "functions" else f"{how}_{name}"
        for source in modules().values()
        for how, name in asks.findall(source)
    }
    page = (PACKAGE.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = page.partition("## Adding another library")[2].partition("\n## ")[0]
    functions = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for cell in functions for name in re.findall(r"`(\w+)\(", cell)} == names


def test_heavy_and_optional_packages_are_imported_where_they_are_used():
    for name, source in modules().items():
        at_import = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
        assert not at_import & NEVER_AT_IMPORT, name
        if name in LOOSE or name.startswith("core.spec"):
            assert "torch" not in at_import, name


@pytest.mark.parametrize(
    ("name", "line", "wrong"),
    [
        ("core.spec.matching", "def f():\n    from lora_inject.core.layers import kinds",
         "core.spec.matching imports core.layers.kinds"),
        ("cli.look", "from lora_inject import plan", f"cli.look imports {ROOT}"),
        ("formats.mlx", "from lora_inject.formats import clients", "circle: "),
    ],
)  # fmt: skip
def test_an_import_that_is_not_allowed_is_found(name, line, wrong):
    sources = modules()
    sources[name] = f"{line}\n"
    assert any(each.startswith(wrong) for each in violations(sources))
