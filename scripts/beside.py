"""Beside which stacks lora-inject can be installed: asked of the package index, as a table.

    python scripts/beside.py [--python 3.12] [STACK ...]      for instance: vllm==0.33.0

Needs uv (https://docs.astral.sh/uv). Each row is one `uv pip compile` of what pyproject.toml asks
for and of the stack: nothing is installed. A "no" is followed by the reason that uv gives.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
STACKS = (
    *("vllm==0.33.0", "vllm==0.25.0", "vllm==0.20.0", "vllm==0.11.0", "sglang==0.5.23"),
    *("axolotl==0.21.0", "unsloth==2026.10.9", "llamafactory==0.9.5", "verl", "trl"),
    *("diffusers", "lightning", "gradio"),
)
SHOWN = ("torch", "transformers")
MOST_SAID = 300  # characters of uv's reason


def asked_for(extra: str | None) -> list[str]:
    """What pyproject.toml asks for, with an extra or without."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    more = [] if extra is None else project["optional-dependencies"][extra]
    return [*project["dependencies"], *more]


def resolve(uv: str, stack: str, extra: str | None, python: str) -> tuple[bool, str]:
    """Whether a set exists in which both are, and its versions or uv's reason."""
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_40", "-"]
    requirements = "\n".join([*asked_for(extra), stack])
    done = subprocess.run(command, input=requirements, capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.encode("ascii", "ignore").decode().split()  # without what uv draws
        return False, " ".join(words)[:MOST_SAID]
    return True, done.stdout


def version_of(package: str, pins: str) -> str:
    """The version of a package among pins, a dash where it is not there."""
    line = re.search(rf"^{re.escape(package)}==(\S+)", pins, re.MULTILINE)
    return "-" if line is None else line[1]


def row(uv: str, stack: str, python: str) -> str:
    """One row of the table."""
    works, core = resolve(uv, stack, None, python)
    works_with_extra, extra = resolve(uv, stack, "transformers", python)
    name, pins = stack.partition("=")[0], extra if works_with_extra else core
    cells = [
        name + " " + version_of(name, pins) if works else stack.replace("==", " "),
        "yes" if works else f"no: {core}",
        "yes" if works_with_extra else f"no: {extra}",
        *(version_of(package, pins) for package in SHOWN),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stacks", nargs="*", default=STACKS, metavar="STACK")
    parser.add_argument("--python", default="3.12", help="version of Python (3.12)")
    options = parser.parse_args()
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("error: there is no uv here. pip install uv")
    print("| beside | lora-inject | with [transformers] | torch then | transformers then |")
    print("|---|---|---|---|---|")
    with ThreadPoolExecutor(2) as pool:
        for line in pool.map(lambda stack: row(uv, stack, options.python), options.stacks):
            print(line, flush=True)


if __name__ == "__main__":
    main()
