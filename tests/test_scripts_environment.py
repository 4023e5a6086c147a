"""The shell scripts before they run anything: --help, and the environment that they share."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
SCRIPTS = sorted(p.name for p in (REPO / "scripts").glob("*.sh") if p.name != "environment.sh")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the scripts need of a checkout, without an environment."""
    shutil.copytree(REPO / "scripts", tmp_path / "scripts")
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    return tmp_path


def shell(checkout: Path, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell that has sourced scripts/environment.sh."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source scripts/environment.sh; {command}"],
        cwd=checkout, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHON": sys.executable, **variables},
    )  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_makes_no_environment(checkout: Path, name: str) -> None:
    before = {*checkout.rglob("*")}
    done = subprocess.run(
        ["bash", checkout / "scripts" / name, "--help"],
        cwd="/", capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert name in done.stdout
    assert "set -euo" not in done.stdout
    assert {*checkout.rglob("*")} == before


def test_a_folder_that_the_scripts_did_not_make_stays(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "mine").touch()
    done = shell(checkout, "make_environment")
    assert done.returncode == 1
    assert ".venv is in the way" in done.stderr
    assert (checkout / ".venv" / "mine").exists()


FAKE = """
fill() {
    echo made
    mkdir -p "$venv/bin"
    ln -sf "$1" "$venv/bin/python"
}
make_environment
"""


def test_an_environment_is_made_once_for_the_same_versions(checkout: Path) -> None:
    assert shell(checkout, FAKE).stdout == "made\n"
    assert shell(checkout, FAKE).stdout == ""
    with (checkout / "scripts" / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    assert shell(checkout, FAKE).stdout == "made\n"
    assert shell(checkout, FAKE).stdout == ""


def test_no_python_that_is_new_enough_is_said(checkout: Path) -> None:
    done = shell(checkout, "make_environment", PYTHON="python-that-is-not-here")
    assert done.returncode == 1
    assert "none of 'python-that-is-not-here' is 3.11 or newer" in done.stderr
    assert not (checkout / ".venv").exists()


def test_the_site_is_left_out_where_python_is_too_old_for_it(checkout: Path) -> None:
    old = checkout / "old-python"
    old.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 11, 2); $2"\n'
    )
    old.chmod(0o755)
    assert shell(checkout, f"docs_extra '{old}'").stdout == "\n"
    assert shell(checkout, f"docs_extra '{sys.executable}'").stdout == ",docs\n"


def test_a_set_is_made_with_its_versions(checkout: Path) -> None:
    told = 'fill() { echo "$2: ${extras} ${*:3:2}"; mkdir -p "$venv"; }; '
    assert shell(checkout, f"{told} make_set 2.6").stdout.startswith(
        "the set 2.6: train torch==2.6.0 transformers==4.57.6"
    )
    done = shell(checkout, f"{told} make_set 1.0")
    assert done.returncode == 1
    assert "There are 2.6 2.8 2.9 2.11 2.13 2.14." in done.stderr


def test_each_set_is_a_job_of_ci() -> None:
    sets = (REPO / "scripts" / "sets.txt").read_text().splitlines()
    names = [line.split()[0] for line in sets if not line.startswith("#")]
    workflow = (REPO / ".github" / "workflows" / "ci.yml").read_text()
    assert f"set: {str(names).replace(chr(39), chr(34))}" in workflow
