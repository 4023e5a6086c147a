"""The versions that the tests passed on: scripts/constraints.txt, and what differs from them here.

    python scripts/versions.py show     what is installed, and how it differs
    python scripts/versions.py renew    write the file from what is installed

The file holds on every platform and on each supported version of Python. So the oldest one writes
it, without what a build of torch for CUDA brings along in its own exact versions.
"""

from __future__ import annotations

import platform
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

CONSTRAINTS = Path(__file__).with_name("constraints.txt")
OLDEST = "3.11"
HEAD = f"""\
# The versions that all tests passed on, for Python {OLDEST} and newer. Written by
# `bash scripts/test.sh --newest` when the newest of everything passes; used by all scripts here.
"""
LEFT_OUT = re.compile(r"nvidia-|cuda-|triton$|lora-inject$|pip$|setuptools$|uv$|llm-smol|gt-all-")


def installed() -> dict[str, str]:
    """The version of each package here, without a build's label as in 2.13.0+cpu."""
    every = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version for d in distributions()}
    return {name: version.partition("+")[0] for name, version in sorted(every.items())}


def differences() -> dict[str, tuple[str, str]]:
    """Of packages and Python that are here in another version: the tested one, and that here."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    here = installed() | {"Python": ".".join(platform.python_version_tuple()[:2])}
    pairs = {
        name: (due, here.get(name, due)) for name, due in (tested | {"Python": OLDEST}).items()
    }
    return {name: (due, got) for name, (due, got) in pairs.items() if due != got}


def main() -> None:
    """Do what the first argument says."""
    if sys.argv[1:] == ["renew"] and platform.python_version().startswith(OLDEST):
        lines = [f"{n}=={v}\n" for n, v in installed().items() if not LEFT_OUT.match(n)]
        CONSTRAINTS.write_text(HEAD + "".join(lines), encoding="utf-8")
    found = installed()
    names = ("torch", "transformers", "peft")
    print(", ".join([f"Python {platform.python_version()}", *(f"{n} {found[n]}" for n in names)]))
    for name, (due, got) in differences().items():
        print(f"  {name} {due} -> {got}")


if __name__ == "__main__":
    main()
