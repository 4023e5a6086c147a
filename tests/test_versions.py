"""The pinned versions, which warnings fail a test on other ones, and what is said of failures."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import script
from helpers import own_warnings

REPO = Path(__file__).parents[1]
versions = script("versions")
causes = script("causes")

# Category, the module that a warning is attributed to, whether it fails a test off the pins.
CASES = [
    ("DeprecationWarning", "lora_inject.layers.reading", True),
    ("FutureWarning", "lora_inject", True),
    ("RuntimeWarning", "lora_inject.layers.reading", True),
    ("UserWarning", "lora_inject.layers.reading", True),
    ("UserWarning", "test_merging", True),
    ("RuntimeWarning", "helpers.models", True),
    ("ResourceWarning", "conftest", True),
    ("UserWarning", "finetuning.finetune", True),
    ("FutureWarning", "test_merging", False),
    ("DeprecationWarning", "zoo.exceptions", False),
    ("DeprecationWarning", "torch.jit", False),
    ("FutureWarning", "transformers.trainer", False),
    ("RuntimeWarning", "torch._dynamo.guards", False),
    ("UserWarning", "torch.nn.modules.module", False),
    ("SyntaxWarning", "/venv/lib/torchao/quantization/quant_api", False),
    ("UserWarning", "lora_injector", False),
    ("UserWarning", "test_mergings_of_others", False),
]


def outcomes(folder: Path, filters: list[str]) -> dict[str, bool]:
    """Whether a test fails by each warning, in a pytest with these filters."""
    (folder / "pytest.toml").write_text(f"[pytest]\nfilterwarnings = {json.dumps(filters)}\n")
    (folder / "test_cases.py").write_text(
        "import builtins, warnings, pytest\n"
        f"@pytest.mark.parametrize('case', {[(c, m) for c, m, _ in CASES]!r}, ids='-'.join)\n"
        "def test_case(case):\n"
        "    category = getattr(builtins, case[0])\n"
        "    warnings.warn_explicit('of itself', category, 'file.py', 1, module=case[1])\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", "pytest.toml", "-rA", "-p", "no:xdist", "."]
    output = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout
    ends = {"PASSED": False, "FAILED": True}
    lines = [line.split()[:2] for line in output.splitlines() if line.split(" ")[0] in ends]
    return {name.partition("[")[2].rstrip("]"): ends[end] for end, name in lines}


def test_off_the_pins_only_warnings_of_our_own_code_fail_a_test(tmp_path: Path) -> None:
    wanted = {f"{category}-{module}": fails for category, module, fails in CASES}
    assert outcomes(tmp_path, own_warnings.filters(pinned=False)) == wanted


def test_on_the_pins_every_warning_fails_a_test(tmp_path: Path) -> None:
    assert set(outcomes(tmp_path, own_warnings.filters(pinned=True)).values()) == {True}


def test_the_filters_of_this_run_are_those_of_its_versions(pytestconfig: pytest.Config) -> None:
    filters = own_warnings.filters(pinned=not versions.differences())
    assert pytestconfig.getini("filterwarnings")[: len(filters)] == filters


def test_the_pinned_versions_are_exact_and_of_what_the_package_needs() -> None:
    pinned = versions.pinned()
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={'.'.join(map(str, versions.OLDEST))}"
    assert all(exact[:1].isdigit() and "+" not in exact for exact in pinned.values())
    assert {"torch", "transformers", "pydantic", "pytest", "ruff", "mkdocs-material"} <= {*pinned}


def test_a_version_that_differs_from_the_pinned_one_is_named(monkeypatch, tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    installed = versions.installed("torch")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    monkeypatch.setattr(versions, "CONSTRAINTS", file)
    monkeypatch.setattr(versions, "OLDEST", sys.version_info[:2])
    file.write_text(f"# made by hand\nabsent-here==1.0\ntorch=={installed}\n")
    assert versions.differences() == {}
    file.write_text("torch==1.0\n")
    assert versions.differences() == {"torch": ("1.0", installed)}
    monkeypatch.setattr(versions, "OLDEST", (3, 2))
    assert versions.differences().keys() == {"Python", "torch"}
    assert versions.differences()["Python"] == ("3.2", python)


def test_the_file_is_made_from_what_is_installed(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(versions, "CONSTRAINTS", tmp_path / "constraints.txt")
    versions.renew()
    pinned = versions.pinned()
    assert pinned["torch"] == versions.installed("torch")
    assert not {"lora-inject", "pip", "triton", "nvidia-cublas"} & {*pinned}


JUNIT = """<testsuites><testsuite>
<testcase classname="test_a" name="test_one"/>
<testcase classname="test_a" name="test_two"><failure message="LayerError: no value">
def read():
>       flag
E       AttributeError: module 'jit' lacks '_flag_1'

The above exception was the direct cause of the following exception:
E       lora_inject.errors.LayerError: no value
</failure></testcase>
<testcase classname="test_b" name="test_three"><error message="">
E   AttributeError: module 'jit' lacks '_flag_2'
</error></testcase>
<testcase classname="test_b" name="test_four"><failure message="">
E   RuntimeWarning: Guards may run slower
</failure></testcase>
</testsuite></testsuites>"""


def test_what_broke_is_said_in_a_line_for_each_cause(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "junit.xml").write_text(JUNIT)
    (tmp_path / "mypy.log").write_text("note\nlora_inject/a.py:3: error: wrong\nmore\n")
    monkeypatch.setattr(sys, "argv", ["causes.py", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        causes.main()
    assert end.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        "broken: mypy: lora_inject/a.py:3: error: wrong (3 lines)",
        "broken: 2 tests: AttributeError: module 'jit' lacks '_flag_1' (first in test_a::test_two)",
        "broken: 1 test: RuntimeWarning: Guards may run slower (first in test_b::test_four)",
    ]
