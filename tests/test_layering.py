"""Who may import whom: a file imports only from files above it in the ladder.

One idea: the ladder is a table, and imports are read from the source (`ast`), also those inside
functions and under TYPE_CHECKING, so that nothing can be hidden in a corner. Within one rung files
may use each other, as long as that never goes in a circle.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lora_inject

PACKAGE = Path(lora_inject.__file__).parent

# From the top down; `X.*` is every file of a package that has no rung of its own.
LADDER = (
    ("version", "errors"),
    ("sites", "names", "yaml_document"),
    ("config", "inventory"),
    ("plans",),
    ("matching",),
    ("functional.*", "functional"),
    ("layers.loading", "layers.reentrant"),
    ("layers.selection",),
    ("layers.mounts",),
    ("layers.base",),
    ("layers.swap",),
    ("layers.*",),
    ("layers.table",),
    ("layers",),
    ("carried",),
    ("listing", "reached", "trainable"),
    ("surgery",),
    ("switching", "merging"),
    ("state",),
    ("formats.*", "formats"),
    ("saving",),
    ("swapping",),
    ("training",),
    ("checkpoint.*", "checkpoint"),
    ("analysis.*", "analysis"),
    ("cli.models", "cli.show", "cli.show_analysis", "cli.program"),
    ("cli.analysis", "cli.commands", "cli.on_disk"),
    ("cli",),
    ("__main__",),
)
ROOT = "the package's front"  # lora_inject/__init__.py, for users; no file inside imports it

# What costs seconds, or need not be installed, is imported where it is used.
NEVER_AT_IMPORT = {"transformers", "peft", "accelerate", "gguf", "loralib", "huggingface_hub"}
NEVER_AT_IMPORT |= {"matplotlib"}
# Names, configs and plans are values without tensors.
WITHOUT_TORCH = (
    "version",
    "errors",
    "sites",
    "names",
    "yaml_document",
    "config",
    "inventory",
    "plans",
    "matching",
)


def modules() -> dict[str, str]:
    """Dotted name below the package to source."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name or ROOT] = path.read_text(encoding="utf-8")
    return found


def imports(name: str, source: str, known: Iterable[str]) -> set[str]:
    """Files of the package that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
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


def _inside(target: str) -> str | None:
    if target == "lora_inject":
        return ROOT
    return target.removeprefix("lora_inject.") if target.startswith("lora_inject.") else None


def rung(name: str) -> int:
    """Number of a file's rung, from the top down."""
    for pattern in (name, f"{name.rpartition('.')[0]}.*"):
        for i, row in enumerate(LADDER):
            if pattern in row:
                return i
    raise AssertionError(f"'{name}' has no rung: give it one in LADDER and in ARCHITECTURE.md")


def violations(sources: Mapping[str, str]) -> list[str]:
    """Every import that goes down the ladder, and the circle if there is one."""
    graph = {name: imports(name, text, sources) for name, text in sources.items() if name != ROOT}
    wrong = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in sorted(others)
        if other == ROOT or rung(other) > rung(name)
    ]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        wrong.append(f"circle: {' <- '.join(circle.args[1])}")
    return wrong


def top_level(source: str) -> set[str]:
    """Packages that a file imports when it is imported itself."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.expr):
            pending += ast.iter_child_nodes(node)
    return found


def test_a_file_imports_only_from_files_above_it():
    assert violations(modules()) == []


def test_every_rung_is_in_use():
    names = set(modules())
    for row in LADDER:
        for entry in row:
            head = entry.removesuffix(".*")
            assert entry in names or any(n.startswith(f"{head}.") for n in names), entry


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_names_and_configs_need_no_torch(name):
    assert "torch" not in top_level(modules()[name])
    assert rung(name) < rung("functional")  # so that nothing above brings it in


def test_heavy_and_optional_packages_are_imported_where_they_are_used():
    for name, source in modules().items():
        assert not top_level(source) & NEVER_AT_IMPORT, name


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("errors", "from lora_inject.config import Config", "errors imports config"),
        ("config", "import lora_inject.matching", "config imports matching"),
        ("matching", "def f():\n    from lora_inject.layers import table",
         "matching imports layers.table"),
        ("state", "from lora_inject import formats", "state imports formats"),
        ("surgery", "from lora_inject.merging import merge", "surgery imports merging"),
        ("cli.commands", "from lora_inject import plan", f"cli.commands imports {ROOT}"),
        ("layers.linear", "if TYPE_CHECKING:\n    import lora_inject.layers.table",
         "layers.linear imports layers.table"),
    ],
)  # fmt: skip
def test_an_import_down_the_ladder_is_found(name, line, expected):
    sources = modules()
    sources[name] = f"{line}\n"
    assert [wrong for wrong in violations(sources) if not wrong.startswith("circle")] == [expected]


def test_a_circle_within_a_rung_is_found():
    sources = modules()
    sources["formats.native"] += "\nfrom lora_inject.formats import peft\n"
    sources["formats.peft"] += "\nfrom lora_inject.formats import native\n"
    assert any(wrong.startswith("circle: ") for wrong in violations(sources))


def test_a_new_file_needs_a_rung():
    with pytest.raises(AssertionError, match="'shiny' has no rung"):
        violations({**modules(), "shiny": "import lora_inject.errors"})


def test_an_import_on_the_way_is_seen_at_every_depth():
    text = (
        "try:\n    import torch\nexcept ImportError:\n    import peft\nclass A:\n    import gguf\n"
    )
    text += "def f():\n    import transformers\n"
    assert top_level(text) == {"torch", "peft", "gguf"}
