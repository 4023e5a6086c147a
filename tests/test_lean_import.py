"""`import lora_inject` and the command line's help bring in nothing heavy or optional.

One idea: a subprocess says what it has imported, and the same check is shown to fail where there is
something to find.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lora_inject

HEAVY = ("transformers", "peft", "accelerate", "gguf", "loralib", "huggingface_hub", "datasets")
HEAVY += ("matplotlib",)

# The code to look at, the names to look for; prints those that it brought in.
REPORT = """
import json, sys
try:
    {code}
except SystemExit as left:
    assert not left.code, left.code
print(json.dumps([name for name in {names!r} if name in sys.modules]), file=sys.stderr)
"""


def brought_in(code: str, *argv: str, names: tuple[str, ...] = HEAVY) -> list[str]:
    """Which of `names` are imported after `code` has run in a fresh interpreter."""
    text = REPORT.format(code=code, names=names)
    root = str(Path(lora_inject.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", text, *argv], capture_output=True, text=True, cwd=root, check=True
    )
    return json.loads(done.stderr.splitlines()[-1])


MAIN = "from lora_inject.cli import main; main()"
MODULE = "import runpy; runpy.run_module('lora_inject', run_name='__main__', alter_sys=True)"


@pytest.mark.parametrize(
    ("code", "argv"),
    [
        ("import lora_inject", ()),
        ("import lora_inject.formats, lora_inject.checkpoint", ()),
        ("import lora_inject; lora_inject.analysis.analyse", ()),
        (MAIN, ("--help",)),
        (MODULE, ("--help",)),
        (MAIN, ("merge", "--help")),
        (MAIN, ("schema",)),
    ],
    ids=["package", "files", "analysis", "script", "module", "help of a command", "schema"],
)
def test_nothing_heavy_is_imported(code, argv):
    assert brought_in(code, *argv) == []


def test_help_does_not_wait_for_the_commands(tmp_path):
    names = ("lora_inject.checkpoint", "lora_inject.cli.models", "lora_inject.cli.show")
    assert brought_in(MAIN, "--help", names=names) == []


def test_analysis_waits_until_it_is_asked_for():
    names = ("lora_inject.analysis", "lora_inject.checkpoint")
    assert brought_in("import lora_inject", names=names) == []
    assert brought_in("import lora_inject; lora_inject.analysis", names=names) == [*names]
    with pytest.raises(AttributeError, match="'lora_inject' has no attribute 'nonsense'"):
        lora_inject.nonsense  # noqa: B018


@pytest.mark.parametrize("code", ["import transformers", "from transformers import GPT2Config"])
def test_the_check_can_fail(code):
    assert "transformers" in brought_in(code)


def test_the_check_sees_what_a_command_brings_in(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 12}')
    (tmp_path / "lora.yaml").write_text("{rank: 2, targets: [c_attn]}")
    found = brought_in(MAIN, "plan", str(tmp_path / "lora.yaml"), str(tmp_path))
    assert "transformers" in found
    assert "peft" not in found
