"""`import lora_inject` and the command line's help bring in nothing heavy or optional.

A subprocess says what it has imported, and the same check is shown to fail where there is
something to find.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.checkpoints import LLAMA, llama_adapter, llama_tensors, save_checkpoint

import lora_inject
from lora_inject.formats import write_adapter

HEAVY = ("transformers", "peft", "accelerate", "gguf", "loralib", "huggingface_hub", "datasets")
HEAVY += ("matplotlib",)

# The steps to take, the names to look for; prints those that each step brought in.
REPORT = """
import json, sys
for code in {steps!r}:
    before = sys.modules.keys() & set({names!r})
    exec(code)
    print(json.dumps([name for name in {names!r} if name in sys.modules and name not in before]))
"""


def brought_in(*steps: str, names: tuple[str, ...]) -> list[list[str]]:
    """Which of `names` each step imports, one after the other in a fresh interpreter."""
    root = str(Path(lora_inject.__file__).parents[1])
    code = [sys.executable, "-c", REPORT.format(steps=steps, names=names)]
    done = subprocess.run(code, capture_output=True, text=True, cwd=root, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def commands_bring_in(*argv: str, names: tuple[str, ...] = HEAVY) -> list[str]:
    """Which of `names` a command imports, by the interpreter's own record."""
    command = [sys.executable, "-X", "importtime", "-m", "lora_inject", *argv]
    root = str(Path(lora_inject.__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "lora_inject.cli" in imported
    return [name for name in names if name in imported]


def test_names_are_imported_when_they_are_used_and_none_is_heavy():
    lazy = ("torch", "pydantic", "lora_inject.model.inject", "lora_inject.checkpoint")
    lazy += ("lora_inject.analysis",)
    every = "from lora_inject import *; assert callable(inject) and callable(swap_adapter)"
    steps = {
        "import lora_inject": [],
        "import lora_inject.checkpoint": ["torch", "lora_inject.checkpoint"],
        "import lora_inject.spec.config, lora_inject.spec.matching": ["pydantic"],
        "lora_inject.plan, lora_inject.analysis": ["lora_inject.model.inject", lazy[-1]],
        f"{every}; import lora_inject.formats; lora_inject.analysis.analyze": [],
        "import transformers": ["transformers"],  # the check can fail
    }
    found = brought_in(*steps, names=(*HEAVY, *lazy))
    assert {name for name in found.pop() if name in HEAVY} >= {"transformers"}
    assert found == [sorted(new, key=(*HEAVY, *lazy).index) for new in list(steps.values())[:-1]]
    for name in lora_inject.__all__:
        assert getattr(lora_inject, name) is not None, name
        assert name in dir(lora_inject)
    with pytest.raises(AttributeError, match="'lora_inject' has no attribute 'nonsense'"):
        lora_inject.nonsense  # noqa: B018


@pytest.mark.parametrize("argv", [("merge", "--help"), ("schema",)])
def test_no_command_imports_anything_heavy(argv):
    assert commands_bring_in(*argv) == []


def test_a_merge_imports_neither_transformers_nor_what_only_models_need(tmp_path):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 2, LLAMA)
    adapter = write_adapter(llama_adapter(tensors), tmp_path / "adapter", format="peft")
    names = (*HEAVY, "lora_inject.spec.config", "lora_inject.layers", "lora_inject.model.inject")
    argv = ("merge", str(base), str(adapter), "--output", str(tmp_path / "out"))
    assert commands_bring_in(*argv, names=names) == []
    assert (tmp_path / "out" / "config.json").exists()


def test_help_does_not_wait_for_the_commands():
    names = (*HEAVY, "lora_inject.checkpoint", "lora_inject.cli.models", "pydantic", "torch")
    assert commands_bring_in("--help", names=names) == []


def test_the_check_sees_what_a_command_brings_in(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 12}')
    (tmp_path / "lora.yaml").write_text("{rank: 2, targets: [c_attn]}")
    found = commands_bring_in("plan", str(tmp_path / "lora.yaml"), str(tmp_path))
    assert "transformers" in found
    assert "peft" not in found


def test_no_folder_hides_a_public_name():
    """Importing a subpackage sets an attribute of its name on the package."""
    folders = {path.stem for path in Path(lora_inject.__file__).parent.iterdir()}
    assert not folders & set(lora_inject.__all__)
