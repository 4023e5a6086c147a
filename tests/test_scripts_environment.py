"""The environment that the shell scripts share, before it is filled."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the scripts need of a checkout, without an environment."""
    shutil.copytree(REPO / "scripts", tmp_path / "scripts")
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    return tmp_path


def shell(checkout: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell that has sourced scripts/environment.sh."""
    words = ["bash", "-euo", "pipefail", "-c", f"source scripts/environment.sh; {command}"]
    variables = {**os.environ, "PYTHON": sys.executable, "PYTHONDONTWRITEBYTECODE": "1"}
    how = {"cwd": checkout, "capture_output": True, "text": True}
    return subprocess.run(words, check=False, env=variables, **how)


def test_a_folder_that_the_scripts_did_not_make_stays(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "mine").touch()
    done = shell(checkout, "make_environment")
    assert done.returncode == 1
    assert ".venv is in the way" in done.stderr
    assert (checkout / ".venv" / "mine").exists()


def test_an_environment_is_made_once_for_the_same_versions(checkout: Path) -> None:
    fill = 'fill() { echo made; mkdir -p "$venv/bin"; ln -sf "$1" "$venv/bin/python"; }; '
    assert shell(checkout, fill + "make_environment").stdout == "made\n"
    assert shell(checkout, fill + "make_environment").stdout == ""
    with (checkout / "scripts" / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    assert shell(checkout, fill + "make_environment").stdout == "made\n"


def test_a_set_is_made_with_its_versions_and_is_a_job_of_ci(checkout: Path) -> None:
    told = 'fill() { echo "$2: ${extras} ${*:3:2}"; mkdir -p "$venv"; }; '
    assert shell(checkout, f"{told} make_set 2.6").stdout.startswith(
        "the set 2.6: train torch==2.6.0 transformers==4.57.6"
    )
    lines = (REPO / "scripts" / "sets.txt").read_text().splitlines()
    names = [line.split()[0] for line in lines if not line.startswith("#")]
    done = shell(checkout, f"{told} make_set 1.0")
    assert done.returncode == 1
    assert f"There are {' '.join(names)}." in done.stderr
    workflow = (REPO / ".github" / "workflows" / "ci.yml").read_text()
    assert f"set: {str(names).replace(chr(39), chr(34))}" in workflow
