"""Which warnings fail a test, on the pinned versions and on other ones."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import own_warnings

# Category, the module that a warning is attributed to, whether it fails a test off the pins.
CASES = [
    ("DeprecationWarning", "lora_inject.layers.reading", True),
    ("UserWarning", "test_merging", True),
    ("UserWarning", "finetuning.finetune", True),
    ("FutureWarning", "test_merging", False),
    ("UserWarning", "torch.nn.modules.module", False),
    ("UserWarning", "lora_injector", False),
]


@pytest.mark.parametrize("pinned", [True, False])
def test_off_the_pins_only_warnings_of_our_own_code_fail_a_test(
    tmp_path: Path, pinned: bool
) -> None:
    filters = own_warnings.filters(pinned=pinned)
    (tmp_path / "pytest.toml").write_text(f"[pytest]\nfilterwarnings = {json.dumps(filters)}\n")
    (tmp_path / "test_cases.py").write_text(
        "import builtins, warnings, pytest\n"
        f"@pytest.mark.parametrize('case', {[(c, m) for c, m, _ in CASES]!r}, ids='-'.join)\n"
        "def test_case(case):\n"
        "    category = getattr(builtins, case[0])\n"
        "    warnings.warn_explicit('of itself', category, 'file.py', 1, module=case[1])\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", "pytest.toml", "-rA", "-p", "no:xdist", "."]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    outcome = r"^(PASSED|FAILED) test_cases.py::test_case\[(.*?)\]"
    ends = {name: end for end, name in re.findall(outcome, run.stdout, re.MULTILINE)}
    for category, module, fails in CASES:
        assert ends[f"{category}-{module}"] == ("FAILED" if fails or pinned else "PASSED")
