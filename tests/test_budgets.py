"""How much of the package each verb stands on, and what a reader must unfold: upper bounds.

Each bound is what was measured when it was last lowered. A change that goes above one has put a
feature into the core that belongs into a room, or has made a function that nobody reads at once.
"""

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import lora_inject

PACKAGE = Path(lora_inject.__file__).parent

# Stage -> lines of the package that it may load.
LINES = {
    "config": 1_253,
    "forward": 2_560,
    "activate": 2_155,
    "inject": 5_788,
    "merge": 4_162,
    "save, load": 6_687,
    "life": 8_998,
}
STAGES = {
    "config": "from lora_inject import Config",
    "forward": "import lora_inject.core.layers.linear_kinds",
    "inject": "from lora_inject import inject",
    "activate": "from lora_inject import activate",
    "merge": "from lora_inject import merge",
    "save, load": "from lora_inject import save_adapter, load_adapter",
    "life": """
import os, tempfile, torch, lora_inject as li
from torch import nn
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
x = torch.randn(3, 8)
li.inject(model, {"rank": 2, "targets": ["0", "2"]})
optimizer = torch.optim.AdamW(li.adapter_parameters(model).values(), 1e-2)
model(x).pow(2).sum().backward()
optimizer.step()
li.activate(model, None)
li.activate(model, "default")
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "a.safetensors")
    li.save_adapter(model, path, format="native")
    li.eject(model)
    li.load_adapter(model, path)
li.merge(model)
model(x)
li.unmerge(model)
li.eject(model)
""",
}
LOADED = """
import json, sys
loaded = [m for n, m in list(sys.modules.items()) if n.partition(".")[0] == "lora_inject"]
print(json.dumps(sorted({m.__file__ for m in loaded})))
"""

BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.BoolOp)
BRANCHES += (ast.comprehension, ast.match_case)
FORMAT_VERBS = {"read", "write", "detects"}

# Names of what Python's stack and torch keep to themselves, and lines that can do without.
GUARDED = re.compile(r"\b(look_up|needed)\(\"")
PRIVATE = re.compile(
    r"torch\._C\b|_getframe|f_locals|f_code|__closure__|_call_impl|_CheckpointFrame"
    r"|CheckpointFunction|_sequence_nr|_saved_tensors_default_hooks"
)
LIBRARIES = re.compile(
    r"accelerate|bitsandbytes|diffusers|transformers|deepspeed|fsdp|lightning|torchao"
    r"|compressed.tensors|gptqmodel|hqq|quanto|timm|\btrl\b|\bpeft\b",
    re.IGNORECASE,
)


@cache
def loaded_by(code: str) -> dict[str, int]:
    """Files of the package that a program loads, below the package, with their lines."""
    command = [sys.executable, "-c", code + LOADED]
    root = PACKAGE.parent  # from which `-c` imports
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    paths = [Path(path) for path in json.loads(run.stdout.splitlines()[-1])]
    return {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in paths
    }


def sources() -> dict[str, str]:
    """Each file of the package, below it, with its text."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {p.relative_to(PACKAGE).as_posix(): p.read_text(encoding="utf-8") for p in paths}


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function without those of functions inside."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child
            yield from own_nodes(child)


def tall_functions(files: dict[str, str]) -> list[tuple[int, str]]:
    """Functions with more than ten branches, with their number, the tallest first."""
    tall = []
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n = sum(isinstance(inner, BRANCHES) for inner in own_nodes(node))
                if n > 10:
                    tall.append((n, f"{name}: {node.name}"))
    return sorted(tall, reverse=True)


def public_names(files: dict[str, str]) -> dict[str, set[str]]:
    """Public functions and classes, each with the files that define one of that name."""
    homes = defaultdict(set)
    for name, text in files.items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].add(name)
    return homes


def lines_with(pattern: re.Pattern[str], text: str) -> list[str]:
    """Lines of code that match a pattern and are not guarded, without comments at their end."""
    code = (line.partition("#")[0] for line in text.splitlines())
    return [line for line in code if pattern.search(line) and not GUARDED.search(line)]


def may_look_inside(name: str) -> bool:
    """Whether a file is named after torch or another library, or has the table of such names."""
    of_torch = name.rpartition("/")[2].startswith("torch_")
    return of_torch or name in {"private.py", "private_names.py"} or "integrations/" in name


@pytest.mark.parametrize("stage", STAGES)
def test_a_verb_loads_no_more_of_the_package_than_its_budget(stage: str) -> None:
    loaded = loaded_by(STAGES[stage])
    longest = sorted(loaded.items(), key=lambda entry: -entry[1])
    assert sum(loaded.values()) <= LINES[stage], longest


def test_a_plain_life_loads_none_of_what_is_known_of_other_libraries() -> None:
    rooms = {name.partition("/")[0] for name in loaded_by(STAGES["life"])}
    assert not rooms & {"algebra", "analysis", "checkpoint", "cli", "formats", "quantized"}
    known = {name for name in loaded_by(STAGES["life"]) if name.startswith("integrations/")}
    assert known <= {"integrations/__init__.py", "integrations/libraries.py"}


def test_few_functions_have_more_than_ten_branches() -> None:
    tall = tall_functions(sources())
    assert len(tall) <= 12, tall


def test_a_public_name_has_one_home() -> None:
    """But for the verbs of formats."""
    homes = public_names(sources())
    twice = {n: where for n, where in homes.items() if len(where) > 1 and n not in FORMAT_VERBS}
    assert twice == {}


def test_no_value_is_called_found() -> None:
    """But for the middle part of an error, which is what was found."""
    calling = [
        f"{file}:{node.lineno}"
        for file, text in sources().items()
        if file not in {"errors.py", "core/layers/weight_kinds.py"}
        for node in ast.walk(ast.parse(text))
        if "found" in (getattr(node, "id", None), getattr(node, "arg", None))
    ]
    assert calling == []


def test_no_other_line_looks_at_the_stack_or_at_what_torch_keeps_private() -> None:
    files = {n: text for n, text in sources().items() if not may_look_inside(n)}
    inside = {n: lines for n, text in files.items() if (lines := lines_with(PRIVATE, text))}
    assert inside == {}


def test_no_file_of_the_core_names_another_library() -> None:
    core = {name: text for name, text in sources().items() if name.startswith("core/")}
    naming = [name for name, text in core.items() if LIBRARIES.search(text)]
    assert naming == []


def test_the_measures_see_what_they_are_for() -> None:
    branches = " + ".join(["(1 if x else 2)"] * 11)
    files = {
        "core/a.py": f"def tall(x):\n    return {branches}\n",
        "core/b.py": "def tall(): pass\nclass Other: pass\ndef _own(): pass\n",
    }
    assert tall_functions(files) == [(11, "core/a.py: tall")]
    assert public_names(files)["tall"] == {"core/a.py", "core/b.py"}
    assert lines_with(PRIVATE, "x = 1  # f_code\nframe.f_code\n") == ["frame.f_code"]
    assert lines_with(PRIVATE, 'found = look_up("torch._C._x")\n') == []
    assert LIBRARIES.search('"""What PEFT reads."""')
